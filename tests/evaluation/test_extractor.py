"""The Inception extractor against torch-fidelity, and wrong weights."""

import pytest
import torch

from tests.evaluation.inception import theirs, write_random_weights
from vca.evaluation.extractor import INCEPTION_SHA256, InceptionConfig, load_extractor
from vca.runtime.distributed import World
from vca.runtime.errors import ConfigError

ONE = World(0, 0, 1, torch.device("cpu"))


@pytest.fixture(scope="session")
def weights(artefact):
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return artefact("inception", lambda folder: write_random_weights(folder / "random.pth", images)) / "random.pth"


def test_inception_extractor_equals_torch_fidelity(weights):
    """The same features to the bit; the spatial ones are 7 channels of a branch, position by position."""
    images = torch.randint(0, 256, (3, 3, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    config = InceptionConfig(weights=str(weights), sha256=None)
    found = load_extractor(config, ONE, None)(images)
    network, seen = theirs(weights), []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    pool, logits = network(images)
    assert torch.equal(found.pooled, pool)
    assert torch.equal(found.logits, logits)
    assert found.spatial.shape == (3, 2023)
    for channel, row, column in ((0, 0, 0), (6, 3, 11), (2, 16, 16)):
        flat = (row * 17 + column) * 7 + channel
        assert torch.equal(found.spatial[:, flat], seen[0][:, channel, row, column])


def test_inception_extractor_wrong_weights_refused(weights, tmp_path, monkeypatch):
    def message(**config):
        with pytest.raises(ConfigError) as raised:
            load_extractor(InceptionConfig(**config), ONE, None)
        return str(raised.value)

    said = message(weights=str(weights))
    assert "extractor.sha256=null" in said
    assert INCEPTION_SHA256[:12] in said
    assert "extractor.weights must be the file weights-inception" in message(weights=str(tmp_path / "none.pth"))
    (tmp_path / "text.pth").write_text("<html>not found</html>")
    assert "does not contain the Inception network" in message(weights=str(tmp_path / "text.pth"), sha256=None)
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    assert "does not contain the Inception network" in message(weights=str(tmp_path / "other.pth"), sha256=None)

    def no_network(*arguments, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    said = message()
    for part in (
        "weights-inception-2015-12-05-6726825d.pth",
        INCEPTION_SHA256,
        str(tmp_path / "hub"),
        "no route to host",
    ):
        assert part in said
