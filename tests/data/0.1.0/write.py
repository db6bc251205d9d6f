"""What wrote the files in this folder, with flashconv 0.1.0 and MLX 0.32.4."""
import pickle
from pathlib import Path

import flashconv
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

folder = Path(__file__).parent


def model():
    "Layers of flashconv and mlx.nn."
    return nn.Sequential(flashconv.Conv2d(2, 4, 3, groups=2, padding="same"), nn.ReLU(),
                         flashconv.ConvTranspose2d(4, 2, 3, 2, data_format="channels_first"),
                         nn.Conv1d(3, 3, 3), nn.BatchNorm(3))


def numbered(model):
    "The model with the numbers 0, 1, 2 ... for parameters, in the order of their names."
    for start, (name, value) in enumerate(sorted(tree_flatten(model.parameters()))):
        values = mx.arange(value.size, dtype=mx.float32).reshape(value.shape) + start
        model.load_weights([(name, values)], strict=False)
    return model


if __name__ == "__main__":
    numbered(written := model()).save_weights(str(folder / "weights.safetensors"))
    flashconv.save_torch_state(written, folder / "state.safetensors")
    layers = [written.layers[0], written.layers[2], flashconv.LazyConv3d(4, 3, dtype=mx.float16),
              flashconv.Conv1d(2, 2, 3, device=mx.cpu, data_format="channels_last").eval()]
    layers[3].weight = mx.ones((2, 2, 3))
    (folder / "layers.pickle").write_bytes(pickle.dumps(layers, protocol=4))
