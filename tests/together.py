"""What several processes check together: test_distributed.py starts them.

Each check runs in all processes at once, with the same random numbers. What it compares with is the
whole, which each process has as well, or what a loop or PyTorch gives for it.
"""
import copy
import json
import os
import pickle
import random
import socket
import struct
import sys
import time
import traceback

import flashconv as fc
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from flashconv.convert.models import BatchNorm
from flashconv.distributed import (
    AllToShardedConv, SplitConv, SyncBatchNorm, agree, exchange_halo, halo_bytes,
    join_slabs, sent_after, shard_conv, shard_inplace, slab_sizes, split_slabs, total,
    total_gradients)
from mlx.nn.layers.distributed import _shard

GROUP = mx.distributed.init()
RANK, SIZE = GROUP.rank(), GROUP.size()
PADS = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
CASES = {1: 8, 2: 30, 3: 6, 4: 3}
SHARDS = {1: ((2, 2),), 2: tuple((n, groups) for n in (1, 2, 3) for groups in (1, 2, 4)),
          3: ((2, 1), (2, 3)), 4: ((2, 2),)}  # (spatial axes, groups)


def close(got, wanted, tolerance=1e-4):
    np.testing.assert_allclose(np.array(got), np.array(wanted), tolerance, tolerance)


def own(x, axis, sizes): return mx.split(x, np.cumsum(sizes)[:-1].tolist(), axis)[RANK]


def summed(x):
    "The sum over all processes, by another way than the library's."
    return mx.distributed.all_gather(x[None]).sum(0)


def lengths(x, axis):
    "Of all slabs."
    return mx.distributed.all_gather(mx.array([x.shape[axis]])).tolist()


# Halos ---------------------------------------------------------------------------------------

def check_halo():
    "Values and gradients against NumPy's padding of the whole and a loop that counts."
    rng = random.Random(1)
    for case in range(12 if SIZE < 3 else 4):
        mode, axis = rng.choice(list(PADS)), rng.randrange(3)
        sizes = [rng.randint(3, 6) for _ in range(SIZE)]
        shape = [2, 3, 2]
        shape[axis] = sum(sizes)
        whole = mx.random.normal(shape, key=mx.random.key(case))
        wishes = [(rng.randint(0, 2), rng.randint(0, 2)) for _ in range(SIZE)]
        before, after_ = wishes[RANK]
        slab = own(whole, axis, sizes)
        got = exchange_halo(slab, axis - 3 * (case % 2), before, after_, padding_mode=mode)
        widths = [(2, 2) if i == axis else (0, 0) for i in range(3)]
        padded = np.pad(np.array(whole), widths, PADS[mode])
        starts = np.cumsum([0, *sizes])
        wanted = [range(2 + starts[rank] - b, 2 + starts[rank + 1] + a)
                  for rank, (b, a) in enumerate(wishes)]
        np.testing.assert_array_equal(np.array(got), np.take(padded, wanted[RANK], axis))
        places = np.pad(np.arange(sum(sizes)), 2, PADS[mode], **(
            {"constant_values": -1} if mode == "zeros" else {}))
        counts = np.zeros(sum(sizes))
        for rank, positions in enumerate(wanted):
            for position in positions:
                if places[position] >= 0: counts[places[position]] += rank + 1
        gradient = mx.grad(lambda x: (RANK + 1) * exchange_halo(
            x, axis, before, after_, padding_mode=mode).sum())(slab)
        expected = counts[starts[RANK]:starts[RANK + 1]]
        expected = expected.reshape([-1 if i == axis else 1 for i in range(3)])
        np.testing.assert_array_equal(np.array(gradient), np.broadcast_to(expected, slab.shape))


def check_halo_dtypes():
    "All that MLX sends."
    for dtype in (mx.float32, mx.float16, mx.bfloat16, mx.complex64, mx.int8, mx.uint8, mx.int32,
                  mx.int64, mx.bool_):
        whole = (mx.arange(4 * SIZE) % 2 if dtype == mx.bool_ else mx.arange(4 * SIZE)).astype(dtype)
        got = exchange_halo(split_slabs(whole, 0), 0, 2, 1)
        padded = mx.concatenate([mx.zeros(2, dtype), whole, mx.zeros(1, dtype)])
        assert got.dtype == dtype
        assert got.tolist() == padded[4 * RANK : 4 * RANK + 7].tolist()


def check_halo_transforms():
    "compile, checkpoint, the second derivative, and what is refused."
    whole = mx.random.normal((3, 4 * SIZE), key=mx.random.key(0))
    x = split_slabs(whole, 1)
    def cube(x): return exchange_halo(x, x.ndim - 1, 1, 2, padding_mode="circular") ** 3
    wanted = cube(x)
    compiled = mx.compile(cube)
    for factor in (1, 2, 3): close(compiled(factor * x), factor**3 * wanted)
    def loss(x): return cube(x).sum()
    def twice(x): return (mx.grad(loss)(x) ** 2).sum()
    close(mx.grad(mx.checkpoint(loss))(x), mx.grad(loss)(x))
    close(mx.compile(mx.grad(loss))(x), mx.grad(loss)(x))
    def loss_of_whole(whole):
        return sum((mx.take(whole, mx.arange(4 * rank - 1, 4 * rank + 6) % (4 * SIZE), 1) ** 3).sum()
                   for rank in range(SIZE))
    def twice_of_whole(whole): return (mx.grad(loss_of_whole)(whole) ** 2).sum()
    close(mx.grad(loss)(x), split_slabs(mx.grad(loss_of_whole)(whole), 1))
    close(mx.grad(twice)(x), split_slabs(mx.grad(twice_of_whole)(whole), 1), 1e-3)
    if SIZE == 1: return
    refused(NotImplementedError, lambda: mx.jvp(cube, [x], [x]), "forward-mode")
    refused(NotImplementedError, lambda: mx.vmap(cube)(x), "an axis of the array")


def check_large_halos():
    "Halos that no buffer of the network holds, around a circle: nobody may wait for ever."
    n = 2**21
    x = mx.full((n,), RANK, mx.float32)
    y = exchange_halo(x, 0, n, n, padding_mode="circular") if SIZE > 1 else x
    left, right = (RANK - 1) % SIZE, (RANK + 1) % SIZE
    if SIZE > 1: assert y[0].item() == y[n - 1].item() == left and y[-1].item() == right
    assert y.size == (3 * n if SIZE > 1 else n)


# Layers on slabs -----------------------------------------------------------------------------

def random_layer(rng):
    "(spatial axes, layer) of any kind."
    n = rng.choice((1, 2, 2, 3))
    def numbers(low, high): return tuple(rng.randint(low, high) for _ in range(n))
    groups, transposed = rng.choice((1, 1, 2, 3)), rng.random() < 0.4
    kw = dict(stride=numbers(1, 3), dilation=numbers(1, 3), groups=groups, bias=rng.random() < 0.5,
              data_format=rng.choice(("channels_first", "channels_last")))
    if transposed:
        kw |= {"padding": numbers(0, 2), "output_padding": tuple(
            rng.randint(0, max(pair) - 1) for pair in zip(kw["stride"], kw["dilation"]))}
    else:
        kw |= {"padding": rng.choice((numbers(0, 3), numbers(0, 3), "same", "valid")),
               "padding_mode": rng.choice(list(PADS))}
        if kw["padding"] == "same": kw["stride"] = 1
    cls = getattr(fc, f"Conv{'Transpose' * transposed}{n}d")
    return n, cls(groups * rng.randint(1, 2), groups * rng.randint(1, 2), numbers(1, 4), **kw)


def check_slabs():
    "Any layer, any slabs: values bit for bit by the same algorithm, gradients, or an error for all."
    ran = 0
    for case in range(CASES[SIZE]):
        rng = random.Random(case)
        mx.random.seed(case)
        n, layer = random_layer(rng)
        spatial_axis, sizes = rng.randrange(n), [rng.randint(2, 7) for _ in range(SIZE)]
        spatial = [rng.randint(4, 7) for _ in range(n)]
        spatial[spatial_axis] = sum(sizes)
        last, batched = layer.data_format == "channels_last", rng.random() < 0.7
        shape = (*spatial, layer.in_channels) if last else (layer.in_channels, *spatial)
        axis = spatial_axis + (not last) + batched
        x = mx.random.normal((2, *shape) if batched else shape)
        ran += compare(layer, x, axis, spatial_axis, sizes)
    assert ran > CASES[SIZE] // 3, ran


def compare(layer, x, axis, spatial_axis, sizes):
    "Whether slabs were long enough; what they give is compared with the whole."
    split, slab = SplitConv(layer, spatial_axis - layer.num_spatial_dims), own(x, axis, sizes)
    try: wanted = layer(x)
    except RuntimeError as error:
        refused(RuntimeError if SIZE == 1 else (RuntimeError, ValueError), lambda: split(slab))
        return False
    try: part = split(slab)
    except ValueError as error:
        assert "take fewer processes" in str(error), error
        return False
    close(join_slabs(part, axis), wanted, 1e-5)
    with fc.algorithm("taps"): assert mx.array_equal(join_slabs(split(slab), axis), layer(x))
    cotangent = mx.random.normal(wanted.shape)
    mine = own(cotangent, axis, lengths(part, axis))
    gradients = of_both(layer, split, slab, mine)
    mx.eval(gradients)
    by_whole = of_both(layer, layer, x, cotangent)
    close(gradients[1], own(by_whole[1], axis, sizes))
    close(summed(gradients[0]), by_whole[0], 1e-3)
    return True


def of_both(layer, call, x, cotangent):
    "The gradients of a layer's weight and of its input."
    kept = layer.weight
    def value(weight, x):
        layer.weight = weight
        return (call(x) * cotangent).sum()
    try: return mx.grad(value, argnums=(0, 1))(kept, x)
    finally: layer.weight = kept


def check_network():
    "A deep one with two branches: loss, gradients, and training that keeps all processes together."
    mx.random.seed(0)
    layers = [fc.Conv1d(2, 4, 3, padding=1), fc.Conv1d(4, 4, 5, padding="same", dilation=2),
              fc.Conv1d(4, 4, 3, padding=1, padding_mode="circular"),
              fc.ConvTranspose1d(4, 4, 4, stride=2, padding=1), fc.Conv1d(4, 2, 4, stride=2, padding=1)]
    whole = mx.random.normal((2, 2, 24 * SIZE))

    class Net(nn.Module):
        def __init__(self, wrap):
            super().__init__()
            self.layers = [wrap(layer) for layer in copy.deepcopy(layers)]

        def __call__(self, x):
            first, left, right, *rest = self.layers
            x = mx.tanh(first(x))
            a = left(x)
            x = a + mx.tanh(right(sent_after(x, a)))
            for layer in rest: x = layer(mx.tanh(x))
            return x

    def loss_of(net, x): return (net(x) ** 2).sum()

    def losses_of(net, x, is_split):
        optimizer = optim.SGD(1e-4)
        for _ in range(3):
            loss, gradients = nn.value_and_grad(net, loss_of)(net, x)
            optimizer.update(net, total_gradients(gradients) if is_split else gradients)
            mx.eval(loss, net.parameters())
            yield (summed(loss) if is_split else loss).item()

    by_whole = list(losses_of(Net(lambda layer: layer), whole, False))
    by_slabs = list(losses_of(Net(SplitConv), split_slabs(whole, 2), True))
    close(by_slabs, by_whole)


def check_split_layer():
    "Names in checkpoints, pickles, an output size, and the layer's own errors."
    mx.random.seed(0)
    layer = fc.ConvTranspose2d(2, 3, 3, stride=2, padding=1)
    x = mx.random.normal((1, 2, 5 * SIZE, 4))
    size = (10 * SIZE, 8)
    for split in (SplitConv(layer), pickle.loads(pickle.dumps(SplitConv(layer, group=GROUP))),
                  copy.deepcopy(SplitConv(layer))):
        got = join_slabs(split(split_slabs(x, 2), output_size=size), 2)
        close(got, layer(x, output_size=size), 1e-5)
    model = nn.Sequential(SplitConv(layer), nn.ReLU())
    assert list(fc.convert.state._torch_arrays(model)) == ["0.weight", "0.bias"]
    refused(RuntimeError, lambda: SplitConv(layer)(mx.zeros((1, 5, 4, 4))), "to have 2 channels")


# What is sent --------------------------------------------------------------------------------

def tcp():
    "(bytes sent, bytes that are not sent or not acknowledged yet) of all connections: Linux counts."
    count, pending = 0, 0
    for name in os.listdir("/proc/self/fd"):
        try: is_socket = os.readlink(f"/proc/self/fd/{name}").startswith("socket")
        except OSError: continue
        if not is_socket: continue
        with socket.socket(fileno=os.dup(int(name))) as one:
            try: info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            except OSError: continue
            if info[0] != 1: continue  # it is not connected
            pending += sum(struct.unpack_from("I", info, at)[0] for at in (24, 144))
            count += struct.unpack_from("Q", info, 120)[0]  # tcpi_bytes_acked
    return count, pending


def sent():
    "Bytes that this process has sent, once all of them have arrived."
    while (counted := tcp())[1]: time.sleep(0.01)
    return counted[0]


def check_bytes():
    "Halos and nothing more: forwards, backwards, by hand and by the formula."
    if sys.platform != "linux": return
    rows, channels, width, batch = 8, 3, 5, 2
    row = batch * channels * width * 4
    x = mx.random.normal((batch, channels, rows * SIZE, width), key=mx.random.key(0))
    found = []  # compared when nobody waits for this process any more
    for kernel, dilation in ((1, 1), (3, 1), (4, 2), (5, 1)):
        reach = dilation * (kernel - 1)
        layer = fc.Conv2d(channels, channels, (kernel, 3), padding="same", dilation=(dilation, 1))
        split, slab = SplitConv(layer), split_slabs(x, 2)
        before, after_ = reach // 2, reach - reach // 2
        mx.eval(split(slab))  # where they agree
        counts = [sent()]
        mx.eval(split(slab))
        counts.append(sent())
        mx.eval(mx.vjp(split, [slab], [mx.ones_like(slab)]))
        counts.append(sent())
        forward, both = np.diff(counts)
        halo = row * (before * (RANK < SIZE - 1) + after_ * (RANK > 0))
        gradient = row * (before * (RANK > 0) + after_ * (RANK < SIZE - 1))
        found.append((forward == halo, both == halo + gradient, forward, both, halo, gradient))
        formula = halo_bytes(layer, x.shape, [rows] * SIZE)
        assert formula[RANK] == halo and sum(formula) == (SIZE - 1) * reach * row
    assert all(forward and both for forward, both, *_ in found), found


# Shards --------------------------------------------------------------------------------------

def shardable():
    "Layers of all six kinds, with groups that divide and are divided."
    for n, groups in SHARDS[SIZE]:
        channels = 2 * SIZE * max(groups // SIZE, 1)
        yield getattr(fc, f"Conv{n}d")(channels, channels, 3, padding=1, groups=groups)
        yield getattr(fc, f"ConvTranspose{n}d")(channels, channels, 2, stride=2, groups=groups)
    yield fc.Conv1d(4 * SIZE, 4 * SIZE, 3, data_format="channels_last", padding_mode="reflect",
                    padding=1, bias=False)


def check_shards():
    "Both kinds, alone and in a row: values, gradients, once and twice."
    for case, layer in enumerate(shardable()):
        mx.random.seed(case)
        n, last = layer.num_spatial_dims, layer.data_format == "channels_last"
        shape = (2, *(5,) * n, layer.in_channels) if last else (2, layer.in_channels, *(5,) * n)
        x, channel = mx.random.normal(shape), n + 1 if last else 1
        wanted = layer(x)
        cotangent = mx.random.normal(wanted.shape)
        by_whole = of_both(layer, layer, x, cotangent)

        out = shard_conv(layer, "all-to-sharded")
        mine = own(cotangent, channel, [layer.out_channels // SIZE] * SIZE)
        close(out(x), own(wanted, channel, [layer.out_channels // SIZE] * SIZE), 1e-5)
        weight, gradient = of_both(out, out, x, mine)
        mx.eval(weight, gradient)
        close(weight, out._part_of("weight", by_whole[0]), 1e-3)
        close(gradient, by_whole[1], 1e-3)

        ins = shard_conv(layer, "sharded-to-all")
        part = own(x, channel, [layer.in_channels // SIZE] * SIZE)
        close(ins(part), wanted)
        weight, gradient = of_both(ins, ins, part, cotangent)
        close(weight, ins._part_of("weight", by_whole[0]), 1e-3)
        close(gradient, own(by_whole[1], channel, [layer.in_channels // SIZE] * SIZE), 1e-3)

        assert isinstance(out, AllToShardedConv) and isinstance(out, type(layer))
        for shard in (out, ins)[SIZE > 2 :]: compare_state(layer, shard)


def compare_state(layer, shard):
    "Whole arrays go out and come in; copies and new draws are parts of the same wholes."
    layer = copy.deepcopy(layer)
    for name, array in shard.state_dict().items(): assert mx.array_equal(array, layer[name])
    twice = {name: 2 * array for name, array in layer.state_dict().items()}
    other = pickle.loads(pickle.dumps(copy.deepcopy(shard)))
    other.load_state_dict(twice)
    assert type(other) is type(shard) and mx.array_equal(other.weight, 2 * shard.weight)
    for each in (layer, shard):
        mx.random.seed(7)
        each.reset_parameters()
    for name, array in shard.state_dict().items(): assert mx.array_equal(array, layer[name])


def check_slices():
    "The slices of mlx.nn, with segments and without; its shard_inplace, too."
    layer = fc.Conv2d(6 * SIZE, 6 * SIZE, 3)
    for segments in (1, 3, [1 / 3, 2 / 3], [2 * SIZE, 4 * SIZE]):
        for sharding, axis in (("all-to-sharded", 0), ("sharded-to-all", 1)):
            mlx = _shard({"weight": layer.weight}, lambda path, w: (axis, segments))["weight"]
            shard = shard_conv(layer, sharding, segments=segments)
            assert mx.array_equal(shard.weight, mlx), (segments, sharding)
            assert mx.array_equal(shard.state_dict()["weight"], layer.weight)
            model = nn.Sequential(copy.deepcopy(layer), nn.ReLU())
            shard_inplace(model, sharding, segments=segments)
            changed = model.layers[0]
            assert mx.array_equal(changed.weight, mlx) and type(changed) is fc.Conv2d
            assert changed(mx.zeros((1, changed.in_channels, 4, 4))).shape[1] == changed.out_channels


def check_block():
    "Two layers of both kinds and an optimizer: training is that of one process."
    mx.random.seed(0)
    first, second = fc.Conv2d(3, 4 * SIZE, 3, padding=1), fc.Conv2d(4 * SIZE, 2, 3)
    x, y = mx.random.normal((4, 3, 6, 6)), mx.random.normal((4, 2, 4, 4))
    whole = nn.Sequential(copy.deepcopy(first), nn.Tanh(), copy.deepcopy(second))
    cut = nn.Sequential(shard_conv(first, "all-to-sharded"), nn.Tanh(),
                        shard_conv(second, "sharded-to-all"))
    def loss_of(net): return ((net(x) - y) ** 2).mean()
    for net in (whole, cut):
        optimizer = optim.Adam(0.01)
        for _ in range(3):
            optimizer.update(net, nn.value_and_grad(net, loss_of)(net)[1])
            mx.eval(net.parameters())
    for i in (0, 2):
        for name, array in cut.layers[i].state_dict().items():
            close(array, whole.layers[i][name], 1e-3)


# Sums, norms, data-parallel training ---------------------------------------------------------

def check_total():
    "The sum's gradients, to the third."
    x = mx.array(RANK + 1.0)
    s = SIZE * (SIZE + 1) / 2
    def loss(x): return (RANK + 1) * total(x) ** 3  # in all, s times the cube of the sum
    first = mx.grad(loss)
    second = mx.grad(first)
    assert first(x).item() == 3 * s * s**2
    assert second(x).item() == SIZE * 6 * s * s
    assert mx.grad(second)(x).item() == SIZE**2 * 6 * s
    assert mx.vmap(total)(mx.ones(3)).tolist() == [SIZE] * 3


def check_sync_batch_norm():
    "Uneven batches against PyTorch's BatchNorm of the whole one: values, statistics, gradients."
    given = np.load(os.environ["NORM"])
    parts = np.array_split(np.arange(len(given["x"])), np.cumsum([2, 1, 3, 1])[: SIZE - 1])
    mine = parts[RANK]
    norm = SyncBatchNorm(3)
    norm.weight, norm.bias = mx.array(given["weight"]), mx.array(given["bias"])
    x, cotangent = (mx.array(np.moveaxis(given[name][mine], 1, -1)) for name in ("x", "cotangent"))
    y = norm(x)
    close(y, np.moveaxis(given["y"][mine], 1, -1))
    close(norm.running_mean, given["running_mean"])
    close(norm.running_var, given["running_var"])
    assert norm.num_batches_tracked.item() == 1
    gradient = mx.grad(lambda x: (norm(x) * cotangent).sum())(x)
    close(gradient, np.moveaxis(given["gradient"][mine], 1, -1))
    def loss(weight):
        norm.weight = weight
        return (norm(x) * cotangent).sum()
    kept = norm.weight
    close(summed(mx.grad(loss)(kept)), given["weight_gradient"], 1e-3)
    norm.weight = kept
    half = x.astype(mx.bfloat16)
    assert norm(half).dtype == BatchNorm(3)(half).dtype
    norm.eval()(x)


def check_data_parallel():
    "The batch, split: losses are those of one process, step by step."
    mx.random.seed(0)
    net = nn.Sequential(fc.Conv2d(1, 4, 3, padding=1), nn.Tanh(), fc.Conv2d(4, 2, 3, stride=2))
    x, y = mx.random.normal((12, 1, 8, 8)), mx.random.normal((12, 2, 3, 3))
    def loss_of(net, x, y): return ((net(x) - y) ** 2).mean()
    losses = []
    for is_split in (False, True):
        copied, optimizer = copy.deepcopy(net), optim.Adam(0.01)
        mine = split_slabs(mx.arange(12), 0) if is_split else mx.arange(12)
        for _ in range(4):
            loss, gradients = nn.value_and_grad(copied, loss_of)(copied, x[mine], y[mine])
            if is_split: gradients = nn.average_gradients(gradients)
            optimizer.update(copied, gradients)
            mx.eval(copied.parameters(), loss)
            losses.append((summed(loss) / SIZE if is_split else loss).item())
    close(losses[4:], losses[:4])


# Errors --------------------------------------------------------------------------------------

def refused(error, call, words=""):
    "All processes raise."
    try: mx.eval(call())
    except error as caught: assert words in str(caught), caught
    else: raise AssertionError(f"{words!r} is not refused")


def check_errors():
    "A ValueError on every process, after which all of them go on."
    other = RANK == SIZE - 1  # one of them is different
    x, layer = mx.zeros((1, 2, 6, 4)), fc.Conv2d(2, 2 * SIZE, 3)
    calls = [
        (lambda: shard_conv(layer, "rows"), "choose one of"),
        (lambda: shard_conv(nn.Linear(2, 2), "all-to-sharded"), "only convolution layers"),
        (lambda: shard_conv(fc.LazyConv2d(2, 3), "all-to-sharded"), "no longer lazy"),
        (lambda: shard_conv(shard_conv(layer, "all-to-sharded"), "all-to-sharded"), "already"),
        (lambda: shard_inplace(nn.Linear(2, 2), "all-to-sharded"), "no convolution layer"),
        (lambda: SplitConv(shard_conv(layer, "all-to-sharded")), "sharded already"),
        (lambda: SplitConv(nn.Conv2d(2, 2, 3)), "takes convolution layers"),
        (lambda: SplitConv(layer, 2), "axis must be from"),
        (lambda: exchange_halo(x, 4, 1, 1), "axis must be from"),
        (lambda: exchange_halo(x, 2, -1, 1), "must not be negative"),
        (lambda: exchange_halo(x, 2, 1, 1, padding_mode="same"), "padding_mode must be one of"),
        (lambda: exchange_halo(x, 2, 6, 0, padding_mode="reflect"), "take fewer processes"),
        (lambda: split_slabs(x, 2, sizes=[1] * SIZE), "whose sum is 6"),
        (lambda: slab_sizes(3, 4), "can't be cut"),
    ]
    if SIZE > 1:
        dtype = mx.float16 if other else mx.float32
        calls += [
            (lambda: shard_conv(fc.Conv2d(3, 2 * SIZE + 1, 3), "all-to-sharded"), "out_channels"),
            (lambda: shard_conv(fc.Conv2d(2 * SIZE + 1, 2, 3), "sharded-to-all"), "in_channels"),
            (lambda: shard_conv(fc.Conv2d(2, 2 * (SIZE + other), 3), "all-to-sharded"), "e"),
            (lambda: shard_conv(fc.Conv2d(2, 2 * SIZE, 3, dtype=dtype), "all-to-sharded"), "dtype"),
            (lambda: exchange_halo(x, 2, 0, 7), "take fewer processes"),
            (lambda: exchange_halo(x.astype(dtype), 2, 1, 1), "dtype must be the same"),
            (lambda: exchange_halo(x[..., : 3 + other], 2, 1, 1), "shape must be the same"),
            (lambda: exchange_halo(x, 2 + other, 1, 1), "must be the same"),
            (lambda: exchange_halo([1] if other else x, 2, 1, 1), "must be mlx.core.array"),
            (lambda: exchange_halo(x, 2, 1.5 if other else 1, 1), "must be int"),
            (lambda: SplitConv(fc.Conv2d(2, 2, 3, padding=other))(x), "layer must be the same"),
            (lambda: SplitConv(layer)(x[:, :, : 1 + 5 * (not other)]), "none for process"),
            (lambda: shard_conv(layer, "all-to-sharded")(x[: 1, :, : 5 + other]), "the same"),
            (lambda: join_slabs(x.astype(dtype), 2), "dtype must be the same"),
            (lambda: SyncBatchNorm(2 + other)(mx.zeros((4, 2 + other))), "num_features must be"),
        ]
    if SIZE > 2:
        calls.append((lambda: SplitConv(fc.Conv2d(2, 2, (15, 3), padding=7))(x), "fewer processes"))
    for call, words in calls: refused((ValueError, TypeError), call, words)
    assert mx.distributed.all_sum(mx.array(1)).item() == SIZE
    assert agree(lambda: RANK) == list(range(SIZE))


CHECKS = {name.removeprefix("check_"): check for name, check in globals().items()
          if name.startswith("check_")}
SOME = "halo large_halos slabs bytes shards sync_batch_norm errors".split()


def checks(processes):
    "The names of those that so many processes run: each more of them shares two cores."
    return SOME if processes == 4 else list(CHECKS)


def main():
    "Run the checks; print name -> None or what went wrong."
    found = {}
    for name in checks(SIZE):
        print(name, flush=True)  # seen if the others wait for ever
        try: found[name] = CHECKS[name]()
        except Exception: print(found.setdefault(name, traceback.format_exc()), flush=True)
    print(json.dumps(found))
