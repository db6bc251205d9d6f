"""The memory that MLX keeps: the limit that the import sets, and whose limits it leaves alone."""
import mlx.core as mx
import pytest

from flashconv import memory


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    "A CPU as the default device, and the limit of before put back."
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    before = mx.set_cache_limit(memory._MLX_LIMIT)
    yield
    mx.set_cache_limit(before)


def limit():
    now = mx.set_cache_limit(0)
    mx.set_cache_limit(now)
    return now


@pytest.mark.parametrize("owned, kept", ((2**40, 2**30), (2**33, 2**30), (2**32 + 9, 2**29 + 1)))
def test_an_eighth_of_the_machine_up_to_a_gigabyte(owned, kept, monkeypatch):
    "Also where that is no round number, on a machine of less than 8 GB."
    monkeypatch.setattr(memory, "_physical_memory", lambda: owned)
    memory.raise_cache_limit()
    assert limit() == kept


@pytest.mark.parametrize("chosen", (0, 2**20, 2**35))
def test_somebodys_choice_stays(chosen):
    "Smaller or larger."
    mx.set_cache_limit(chosen)
    memory.raise_cache_limit()
    assert limit() == chosen
