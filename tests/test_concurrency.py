"""Threads, each with its own stream or the default one, and processes, forked and spawned.

MLX gives each thread its own streams, so an array must be evaluated before another thread works
with it, parameters too. After an evaluation a forked process hangs in MLX at its first own one;
before, or spawned, it works.
"""
import pickle
import subprocess
import sys
import threading
import time
from functools import partial

import mlx.core as mx
import numpy as np
import pytest

import flashconv
from flashconv import draw, functional

THREADS = 4


def together(*jobs):
    "Run each job in a thread of its own, all at once. Gives what they return, or raises."
    results, barrier = [None] * len(jobs), threading.Barrier(len(jobs))

    def work(i):
        barrier.wait()
        try: results[i] = jobs[i]()
        except BaseException as error: results[i] = error

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(len(jobs))]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads: thread.start()
        for thread in threads: thread.join(60)
    finally: sys.setswitchinterval(interval)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    for result in results:
        if isinstance(result, BaseException): raise result
    return results


def python(code, **kwargs):
    "What a fresh process prints."
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60,
                         **kwargs)
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


CASES = {  # name -> (layer, shape of its input)
    "1x1": (partial(flashconv.Conv2d, 6, 4, 1), (3, 6, 9, 9)),
    "dense": (partial(flashconv.Conv2d, 4, 6, 3, padding=1), (3, 4, 20, 20)),
    "depthwise": (partial(flashconv.Conv2d, 6, 6, 3, groups=6), (3, 6, 9, 9)),
    "circular": (partial(flashconv.Conv1d, 4, 6, 3, 2, 2, padding_mode="circular"), (3, 4, 31)),
    "long": (partial(flashconv.Conv1d, 2, 2, 65, padding="same"), (2, 2, 300)),
    "dilated 3d": (partial(flashconv.Conv3d, 2, 4, 2, dilation=2, groups=2), (2, 2, 6, 6, 6)),
    "transposed": (partial(flashconv.ConvTranspose2d, 4, 6, 3, 2, groups=2), (2, 4, 7, 7)),
    "channels last": (partial(flashconv.Conv2d, 4, 6, 3, data_format="channels_last"),
                      (3, 20, 20, 4)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("own_stream", (False, True), ids=("default", "own"))
@pytest.mark.parametrize("compiled", (False, True), ids=("plain", "compiled"))
def test_threads_give_the_numbers_of_one(case, own_stream, compiled):
    "Output and all gradients, bit for bit; each thread has another batch."
    make, shape = CASES[case]
    layer = make()
    mx.eval(layer.parameters())
    inputs = [mx.random.normal((2 + i, *shape[1:])) for i in range(THREADS)]
    mx.eval(inputs)

    def call(x, weight, bias):
        layer_ = make()
        layer_.weight, layer_.bias = weight, bias
        return layer_(x)

    def results(f, x):
        y, gradients = mx.vjp(lambda *a: [f(*a)], [x, layer.weight, layer.bias], [2 * layer(x)])
        mx.eval(y, gradients)
        return [np.array(a) for a in (*y, *gradients, layer(x))]

    def job(f, x):
        repeated = []
        for _ in range(3):
            if own_stream:
                with mx.stream(mx.new_stream(mx.default_device())): repeated.append(results(f, x))
            else: repeated.append(results(f, x))
        return repeated

    f = mx.compile(call) if compiled else call
    expected = [results(f, x) for x in inputs]
    found = together(*(partial(job, f, x) for x in inputs))
    for each, right in zip(found, expected, strict=True):
        for repeated in each:
            for a, b in zip(repeated, right, strict=True): np.testing.assert_array_equal(a, b)


def test_many_shapes_at_once():
    "Geometries that no call has had before, checked and cached by all threads in another order."
    weight = mx.ones((2, 2, 3))
    mx.eval(weight)

    def job(start):
        sizes = [700 + (start + 17 * i) % 60 for i in range(60)]
        return {n: functional.conv1d(mx.ones((1, 2, n)), weight).sum().item() for n in sizes}

    expected = {n: 12.0 * (n - 2) for n in range(700, 760)}
    assert together(*(partial(job, i) for i in range(THREADS))) == [expected] * THREADS


def test_a_forced_algorithm_stays_in_its_thread():
    layer, inside, asked = flashconv.Conv2d(2, 2, 3), threading.Event(), threading.Event()
    chosen = flashconv.explain(layer, (1, 2, 9, 9))[0].algorithm
    other = "taps" if chosen != "taps" else "matmul"

    def forcing():
        with flashconv.algorithm(other):
            inside.set()
            assert asked.wait(30)
            return flashconv.explain(layer, (1, 2, 9, 9))[0].algorithm

    def asking():
        assert inside.wait(30)
        try: return flashconv.explain(layer, (1, 2, 9, 9))[0].algorithm
        finally: asked.set()

    assert together(forcing, asking) == [other, chosen]


def test_explain_sees_its_own_thread_only():
    "Another thread's convolutions are none of what a call runs."
    inside, done = threading.Event(), threading.Event()
    layer, noise = flashconv.Conv1d(2, 2, 3), flashconv.Conv1d(2, 2, 5)
    expected = flashconv.explain(layer, (1, 2, 9))

    def slow(x):
        inside.set()
        assert done.wait(30)
        return layer(x)

    def elsewhere():
        assert inside.wait(30)
        try: noise(mx.ones((1, 2, 9)))
        finally: done.set()

    assert together(lambda: flashconv.explain(slow, (1, 2, 9)), elsewhere)[0] == expected


def test_nested_explain():
    "Two that are open at once, both still empty: each closes its own."
    layer, inner = flashconv.Conv1d(2, 2, 3), []
    expected = flashconv.explain(layer, (1, 2, 9))

    def call(x):
        inner.append(flashconv.explain(lambda x: x, (1, 2, 9)))
        return layer(x)

    assert flashconv.explain(call, (1, 2, 9)) == expected
    assert inner == [flashconv.explain(lambda x: x, (1, 2, 9))]


def test_tune_and_call_at_once():
    "Whichever algorithm is kept meanwhile, the numbers stay within rounding."
    layer, x = flashconv.Conv2d(4, 4, 3, padding=1), mx.random.normal((1, 4, 11, 13))
    mx.eval(layer.parameters(), x)
    expected = np.array(layer(x))
    tune = partial(flashconv.tune, layer, x.shape)
    outputs = together(tune, tune, *[lambda: [np.array(layer(x)) for _ in range(20)]] * 2)[2:]
    for y in sum(outputs, []): np.testing.assert_allclose(y, expected, atol=1e-5)


def test_first_call_of_a_lazy_layer():
    "One thread draws the parameters, and the others wait for it."
    layer, drawn = flashconv.LazyConv2d(4, 3), []

    def reset_parameters():
        drawn.append(threading.get_ident())
        time.sleep(0.05)  # time for another thread to come by
    layer.reset_parameters = reset_parameters

    def job():
        layer(mx.ones((1, 3, 8, 8)))
        return layer.weight

    weights = together(*[job] * THREADS)
    assert len(drawn) == 1
    assert all(weight is weights[0] for weight in weights)
    assert type(layer) is flashconv.Conv2d and layer.in_channels == 3


def test_a_lazy_layer_whose_first_call_fails_elsewhere():
    "A thread that has been refused does not take back what another one has made, or uses by now."
    def refused():
        with pytest.raises(RuntimeError): layer(mx.ones((1, 3, 2, 2)))

    def job(): return layer(mx.ones((1, 3, 8, 8))).shape

    for _ in range(40):
        layer = flashconv.LazyConv2d(4, 3)
        assert together(job, refused, job, refused) == [(1, 4, 6, 6), None, (1, 4, 6, 6), None]
    assert type(layer) is flashconv.Conv2d


def test_pictures():
    "matplotlib's settings are one for all threads, and are as they were afterwards."
    import matplotlib
    before = dict(matplotlib.rcParams)
    expected = [draw.window(3, n).data for n in (5, 6, 7, 8)]
    assert together(*(lambda n=n: draw.window(3, n).data for n in (5, 6, 7, 8))) == expected
    assert dict(matplotlib.rcParams) == before


def test_import_at_once():
    "All threads of a fresh process get the whole package."
    code = """
import os, threading
barrier, done = threading.Barrier(8), []
def work():
    barrier.wait()
    import flashconv
    import mlx.core as mx
    done.append(flashconv.Conv1d(1, 1, 3)(mx.ones((1, 1, 5))).shape)
threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join(30)
print(len(done), set(done), flush=True)
os._exit(0)  # MLX alone, first imported beside the main thread, aborts where a process ends
"""
    assert python(code) == "8 {(1, 1, 3)}\n"


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="no fork here")
def test_fork_after_import_and_construction():
    "Both processes compute with a layer that was made, though not evaluated, before."
    code = """
import os, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # Python's, about threads and fork
import flashconv, mlx.core as mx
mx.random.seed(0)
layer = flashconv.Conv1d(2, 3, 3)
read, write = os.pipe()
child = os.fork()
total = layer(mx.ones((1, 2, 9))).sum().item()
if not child:
    os.write(write, str(total).encode())
    os._exit(0)
os.waitpid(child, 0)
print(os.read(read, 99).decode() == str(total))
"""
    assert python(code) == "True\n"


def test_spawn(tmp_path):
    "A layer goes to a spawned process and back, after computing here, lazy ones too."
    script = tmp_path / "spawned.py"
    script.write_text("""
import multiprocessing
import flashconv, mlx.core as mx
def work(layer):
    y = layer(mx.ones((1, 2, 9, 9)))
    mx.eval(y)
    return layer, y.tolist()
if __name__ == "__main__":
    layers = [flashconv.Conv2d(2, 3, 3), flashconv.ConvTranspose2d(2, 3, 3, 2, device=mx.cpu)]
    expected = [work(layer)[1] for layer in layers]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        *there, lazy = pool.map(work, [*layers, flashconv.LazyConv2d(3, 3)])
    print([y for _, y in there] == expected, type(lazy[0]).__name__, work(lazy[0])[1] == lazy[1])
""")
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=100)
    assert run.stdout == "True Conv2d True\n", run.stderr[-2000:]


def test_pickle_while_others_call():
    layer, x = flashconv.Conv1d(2, 2, 3), mx.ones((1, 2, 9))
    mx.eval(layer.parameters(), x)
    expected = layer(x).tolist()
    copies = [partial(lambda: pickle.loads(pickle.dumps(layer))(x).tolist())] * 2
    assert together(*copies, *[lambda: layer(x).tolist()] * 2) == [expected] * 4
