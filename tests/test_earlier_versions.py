"""Files that released versions wrote: see `data/README.md`."""
import importlib.util
import pickle
from pathlib import Path

import flashconv
import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

FOLDERS = sorted(path for path in (Path(__file__).parent / "data").iterdir() if path.is_dir())


@pytest.fixture(params=FOLDERS, ids=lambda path: path.name)
def folder(request): return request.param


@pytest.fixture
def written(folder):
    "What the version's own script made."
    spec = importlib.util.spec_from_file_location("write", folder / "write.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def same(ours, other):
    ours, other = (dict(tree_flatten(model.parameters())) for model in (ours, other))
    assert set(ours) == set(other)
    for name in ours: assert mx.array_equal(ours[name], other[name]), name


def test_weights(folder, written):
    model = written.model()
    model.load_weights(str(folder / "weights.safetensors"))
    same(model, written.numbered(written.model()))


def test_states(folder, written):
    model = written.model()
    assert flashconv.load_torch_state(model, folder / "state.safetensors") == ([], [])
    same(model, written.numbered(written.model()))


def test_pickles(folder, written):
    conv, up, lazy, last = pickle.loads((folder / "layers.pickle").read_bytes())
    right = written.numbered(written.model())
    x = mx.random.normal((1, 2, 5, 4))
    assert mx.array_equal(conv(x), right.layers[0](x))
    assert mx.array_equal(up(conv(x)), right.layers[2](conv(x)))
    assert lazy(mx.zeros((1, 6, 3, 3, 3), mx.float16)).shape == (1, 4, 1, 1, 1)
    assert (last.training, last.device, last.data_format) == (
        False, mx.Device(mx.cpu), "channels_last")
    assert last(mx.ones((1, 4, 2)))[0, 0, 0] - last.bias[0] == 6
