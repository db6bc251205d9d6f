"""Thousands of random calls and layers, judged by PyTorch in processes that may die.

`python tests/fuzz.py --seed 3 --cases 2000 --jobs 2` draws 2000 cases. Each is a dictionary, drawn
here and judged by judge.py: a failure, a crash or a hang is shrunk and printed as one line that
repeats it. tests/test_random.py judges the first cases of seed 0 in the ordinary run.
"""
import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from queue import Empty, Queue
from random import Random
from threading import Thread, local

# Cases ---------------------------------------------------------------------------------------

KINDS = ("conv", "conv_transpose", "Conv", "ConvTranspose", "LazyConv", "LazyConvTranspose", "pad")
FLOATS = ("float32", "float16", "bfloat16", "float64", "complex64")
KERNEL_TYPES = ("float32", "float16", "bfloat16")
INTEGERS = ("int8", "uint8", "int16", "int32", "int64")
ALGORITHMS = ("native", "matmul", "taps", "fft", "overlap_add", "phases",
              "spread", "volume")
VIEWS = ("transposed", "sliced", "reversed", "broadcast")
MODES = ("reflect", "replicate", "circular")


def draw(seed, number):
    """The case of this number: what is called with which shapes, and what is done to the call.

    `kind` and the number of `sizes` name the function. `in` and `out` are channels per group, and
    a `batch` of None is an unbatched call. `kw` are its keywords, `size` is `output_size`. Then
    may follow: `wrong` (one shape or dtype does not fit), `views` (how the arrays lie in memory),
    `last` (channels), `algorithm` (forced), `tile` (bytes from which work is divided), `of` (the
    gradient of this argument is taken), `axes` (vmapped, per array), `jvp`, `compile`.
    """
    rng = Random(f"{seed} {number}")
    kind, n = rng.choices(KINDS, (4, 4, 2, 2, 1, 1, 2))[0], rng.choice((1, 1, 2, 2, 3))
    case = {"kind": kind, "batch": rng.choice((None, 0, 1, 2, 3)), "in": rng.choice((1, 2, 3)),
            "seed": number}
    if kind == "pad": _draw_pad(rng, n, case)
    else: _draw_convolution(rng, n, case)
    integers = kind in ("conv", "conv_transpose", "pad") and rng.random() < 0.1
    if integers: case["dtype"] = rng.choice(INTEGERS)
    elif rng.random() < 0.5: case["dtype"] = rng.choice(FLOATS)
    if rng.random() < 0.5: case["last"] = True
    _draw_transforms(rng, case, 1 if kind == "pad" else 2 + case.get("bias", False), integers)
    return case


def _draw_pad(rng, n, case):
    mode = rng.choice(("constant", *MODES))
    sizes = case["sizes"] = [rng.randint(rng.random() > 0.1, 6) for _ in range(n)]
    most = [size - (mode == "reflect") if mode in ("reflect", "circular") and rng.random() < 0.9
            else 5 for size in sizes]
    case["kw"] = {"pad": [rng.randint(-2, max(0, high)) for high in reversed(most) for _ in "ab"],
                  "mode": mode}
    if mode == "constant": case["kw"]["value"] = rng.choice((None, 0, 1.5, -2))


def _draw_convolution(rng, n, case):
    transposed, layer = "ranspose" in case["kind"], case["kind"][0].isupper()
    long = rng.random() < 0.15  # where transforms, tiles and other sums come in
    case |= {"groups": rng.choice((1, 1, 1, 2, 3)), "out": rng.randint(1, 3), "kw": {}}
    if rng.random() < 0.5: case["bias"] = True
    if rng.random() < 0.02: case["in" if rng.random() < 0.7 else "out"] = 0
    def each(key, default, values):
        "A keyword in one of its forms, and what it amounts to per axis."
        form = rng.random()
        if form < 0.2: return [default] * n
        case["kw"][key] = values[0] if form < 0.4 else values[:1] if form < 0.45 else values
        return values[:1] * n if form < 0.45 else values
    kernel = [rng.randint(1, (70, 9, 5)[n - 1] if long else 4) for _ in range(n)]
    padding = None if transposed or rng.random() < 0.8 else rng.choice(("same", "valid"))
    stride = [1] * n
    if padding != "same" or rng.random() < 0.1:
        stride = each("stride", 1, [rng.choice((1, 1, 1, 2, 3, 10)) for _ in range(n)])
    dilation = each("dilation", 1, [rng.choice((1, 1, 2, 3)) for _ in range(n)])
    pads, after = [0] * n, [0] * n
    if padding is None: pads = each("padding", 0, [rng.choice((0, 0, 1, 2, 4)) for _ in range(n)])
    else: case["kw"]["padding"] = padding
    if transposed:
        most = list(map(max, stride, dilation))
        if len(set(most)) > 1: case["kw"]["output_padding"] = after = list(map(rng.randrange, most))
        else: after = each("output_padding", 0, list(map(rng.randrange, most)))
    elif layer and rng.random() < 0.6: case["kw"]["padding_mode"] = rng.choice(("zeros", *MODES))
    spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilation)]
    if "padding_mode" in case["kw"] and padding == "same":
        pads = [span // 2 for span in spans]
        case["kw"]["dilation"] = dilation  # of a tuple of length 1 PyTorch pads one axis
    def least(span, p, s, o):
        if transposed: return 1 + max(0, -(-(2 * p - span - o + 1) // s))
        if "padding_mode" in case["kw"]: return max(p + 1, span - 2 * p)
        return 1 if padding == "same" else max(1, span - 2 * p)
    most = (200, 16, 7)[n - 1] if long else 7
    case |= {"kernel": kernel, "sizes": [
        rng.randint(0, 4) if rng.random() < 0.02 else least(*of) + rng.randint(0, most - 1)
        for of in zip(spans, pads, stride, after)]}
    if layer and transposed and rng.random() < 0.4:
        sizes = [(i - 1) * s - 2 * p + span + rng.randint(0, s - 1) + (rng.random() < 0.03)
                 for i, s, p, span in zip(case["sizes"], stride, pads, spans)]
        case["size"] = [7] * rng.choice((0, 0, 1 + (case["batch"] is not None))) + sizes
    if rng.random() < 0.05: _spoil(rng, n, case)


def _spoil(rng, n, case):
    "One argument that does not fit."
    key = rng.choice(("stride", "padding", "dilation", "output_padding", "groups", "length",
                      "channels", "bias", "rank", "dtype"))
    if key == "output_padding" and "ranspose" not in case["kind"]: key = "padding"
    if key == "dtype" and not case["in"]: key = "rank"  # PyTorch looks at no dtype there
    if key == "groups": case[key] = rng.choice((0, -1))
    elif key == "length": case["kw"][rng.choice(("stride", "dilation"))] = [1] * (n + 1)
    elif key in ("stride", "padding", "dilation", "output_padding"):
        case["kw"][key] = rng.choice((-1, 9) if key == "output_padding" else
                                     (-1, 0) if key != "padding" else (-1,))
    elif not case["kind"][0].isupper() or key == "rank": case["wrong"] = key


def _draw_transforms(rng, case, arrays, integers):
    if rng.random() < 0.5:
        case["views"] = [rng.choice((None, *VIEWS)) for _ in range(arrays)]
    compiled = rng.random() < 0.06  # which takes as long as thirty others do
    if case["kind"] != "pad":
        if rng.random() < 0.5: case["algorithm"] = rng.choice(ALGORITHMS)
        if rng.random() < 0.2 and not compiled: case["tile"] = rng.choice((64, 1000, 20000))
    # Without input channels PyTorch gives no output channels, and fails at second derivatives.
    if not integers and rng.random() < 0.35 and case["in"]: case["of"] = rng.randrange(arrays)
    if rng.random() < 0.3:
        ranks = [len(case["sizes"]) + 1 + (case["batch"] is not None), len(case["sizes"]) + 2, 1]
        mapped = rng.sample(range(arrays), rng.randint(1, arrays))
        case["axes"] = [rng.randint(-1, ranks[i]) if i in mapped else None for i in range(arrays)]
        if "of" in case: case["axes"].append(rng.choice((None, 0, 1)))
    if not integers and rng.random() < 0.1:
        case["jvp"] = True
        if rng.random() < 0.9 and case.get("algorithm") == "native": del case["algorithm"]
    if compiled: case["compile"] = True


def through_kernels(case):
    "The case as kernels compute it: by no other algorithm, in one of their types."
    case = {key: value for key, value in case.items() if key not in ("algorithm", "tile")}
    if case.get("dtype", "float32") not in KERNEL_TYPES:
        case["dtype"] = KERNEL_TYPES[case["seed"] % len(KERNEL_TYPES)]
    return case


# Shrinking -----------------------------------------------------------------------------------

def smaller(case):
    "Simpler cases than this one, the simplest first."
    def put(key, value): return {**case, key: value}
    def without(d, key): return {k: v for k, v in d.items() if k != key}
    n = len(case["sizes"])
    for key in ("compile", "jvp", "axes", "of", "views", "algorithm", "tile", "last", "dtype",
                "size", "bias", "wrong"):
        if key in case: yield without(case, key)
    for axis in range(n if n > 1 else 0):
        def drop(v): return v[:axis] + v[axis + 1 :] if isinstance(v, list) and len(v) == n else v
        fewer = {k: drop(v) for k, v in case.items() if k not in ("axes", "views")}
        yield {**case, **fewer, "kw": {k: drop(v) for k, v in case["kw"].items()}}
    for key in case["kw"]: yield put("kw", without(case["kw"], key))
    for key in ("views", "axes"):
        for i, value in enumerate(case.get(key, ())):
            if value: yield put(key, [*case[key][:i], 0 if key == "axes" else None,
                                      *case[key][i + 1 :]])
    for key in ("groups", "batch", "in", "out", "sizes", "kernel", "size"):
        if key in case: yield from (put(key, value) for value in _lower(case[key]))
    for key, old in case["kw"].items():
        yield from (put("kw", {**case["kw"], key: value}) for value in _lower(old))


def _lower(value):
    "Numbers nearer to 1, at one place at a time."
    if isinstance(value, list):
        for i, item in enumerate(value):
            yield from ([*value[:i], low, *value[i + 1 :]] for low in _lower(item))
    elif isinstance(value, int) and value > 1: yield from dict.fromkeys((1, value // 2, value - 1))


def alike(failure): return re.sub(r"[\d.e+-]+", "#", failure)[:50]


def shrink(case, failure, judge, seconds=60):
    "The smallest case found in that time which fails alike, and its failure."
    until = time.monotonic() + seconds
    untried = smaller(case)
    while time.monotonic() < until:
        candidate = next(untried, None)
        if candidate is None: break
        found = judge(candidate)
        if found and alike(found) == alike(failure):
            case, failure, untried = candidate, found, smaller(candidate)
    return case, failure


# Processes -----------------------------------------------------------------------------------

class Worker:
    "A process that judges one case after the other, replaced when it dies or hangs."

    process = None

    def __init__(self, options=()): self.command = [sys.executable, "-W", "ignore", __file__, "--serve", *options]

    def __call__(self, case, seconds=60):
        "The verdict on a case, in one or two words, and what is wrong with it, or None."
        if self.process is None: self.start()
        try:
            print(json.dumps(case), file=self.process.stdin, flush=True)
            answer = self.answers.get(timeout=seconds)
        except BrokenPipeError: answer = None
        except Empty:
            self.process.kill()
            answer = "hang", f"no answer in {seconds} seconds"
        if isinstance(answer, str): return json.loads(answer)
        code, self.process = self.process.wait(), None
        return answer or ("crash", f"the process ended with {code}")

    def start(self):
        self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True)
        self.answers = Queue()
        Thread(target=self.listen, args=(self.process.stdout, self.answers), daemon=True).start()

    def listen(self, lines, answers):
        for line in lines: answers.put(line)
        answers.put(None)


def use_architecture(architecture):
    "Have the kernels of this process be those for another processor, and no others: two would mix."
    from flashconv.kernels import build, primitive
    assert not primitive._is_settled
    build.libraries = partial(build.libraries, architecture)
    assert primitive.available()


def force_threads(count):
    "Have processes started from here, and this one, use so many threads, for the smallest layer too."
    from flashconv.kernels import build
    os.environ["CXX"] = shlex.join([*build.compiler(), "-DFLASHCONV_SMALL_WORK=0"])
    os.environ["FLASHCONV_THREADS"] = str(count)


def serve(architecture):
    "Judge the cases that come in, one per line."
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    if architecture: use_architecture(architecture)
    import conftest  # noqa: F401, its device and precision
    from judge import verdict
    for line in sys.stdin: print(json.dumps(verdict(json.loads(line))), file=answers, flush=True)


def command(case): return f"python tests/fuzz.py --case '{json.dumps(case)}'"


def run(seed, first, cases, jobs, kernels=False, options=()):
    "Judge them all; the number of failures."
    started, counts, known, workers = time.monotonic(), Counter(), Counter(), local()

    def judged(number):
        if not hasattr(workers, "mine"): workers.mine = Worker(options)
        case = through_kernels(draw(seed, number)) if kernels else draw(seed, number)
        word, failure = workers.mine(case)
        if failure is not None and known[alike(failure)] < 3:  # of one sort three are enough
            known[alike(failure)] += 1
            case, failure = shrink(case, failure, lambda case: workers.mine(case)[1])
        return number, case, word, failure

    with ThreadPoolExecutor(jobs) as pool:
        for done, (number, case, word, failure) in enumerate(
                pool.map(judged, range(first, first + cases)), 1):
            counts.update([word, *(key for key in ("of", "axes", "jvp", "compile") if key in case),
                           f"{case['kind']} {len(case['sizes'])}d", case.get("dtype", "float32")])
            if failure: print(f"case {number}: {failure}\n  {command(case)}", flush=True)
            if done % max(1, cases // 20) == 0:
                print(f"{done} cases, {time.monotonic() - started:.0f} s", flush=True)
    failures = cases - counts["equal"] - counts["refused"]
    print("; ".join(f"{name} {count}" for name, count in sorted(counts.items())))
    print(f"seed {seed}: {cases} cases from {first}, {counts['equal']} equal, {counts['refused']} "
          f"refused by both, {failures} failures")
    return failures


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--kernels", action="store_true", help="only what runs in kernels by default")
    parser.add_argument("--threads", type=int, help="of the kernels, for the smallest layer too")
    parser.add_argument("--architecture", help="of the kernels: x86-64-v3 has AVX2, x86-64 SSE2")
    parser.add_argument("--case", help="judge this one alone, in this process")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve: return serve(args.architecture)
    if args.threads: force_threads(args.threads)
    if args.architecture: use_architecture(args.architecture)  # compiled here, once for all
    elif args.threads: subprocess.run([sys.executable, "-m", "flashconv", "build"], check=True)
    if args.case is None:
        options = ("--architecture", args.architecture) if args.architecture else ()
        return run(args.seed, args.first, args.cases, args.jobs, args.kernels, options) > 0
    from judge import judge
    print(judge(json.loads(args.case)))


if __name__ == "__main__": sys.exit(main())
