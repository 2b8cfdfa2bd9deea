"""Export of whole networks with a dynamic batch: `torch.export`, and ONNX in ONNX Runtime."""

import pytest
import torch
from torch import Tensor, nn

from models import CLASSIFIERS
from models.dit import DiT
from tests.models import test_classifiers, test_dit

# One block in most stages: ONNX takes seconds for a block.
FIELDS = {
    "deit": {"depth": 1},
    "pvt": {"depths": [1, 1, 1, 1]},
    "swin": {"depths": [1, 1, 1, 2], "img_size": 64},
    "cswin": {"depths": [1, 1, 1, 1]},
}


class GuidedStep(nn.Module):
    """Network evaluation of a DiT sampling step: noise and variance under guidance."""

    def __init__(self, network: DiT) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.network.forward_with_cfg(x, t, y, scale=4.0)


class EulerStep(GuidedStep):
    """A step of 1 / 10 along SiT's velocity."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return x + 0.1 * self.network(x, t, y)[:, :4]


STEPS = {"dit": GuidedStep, "sit": EulerStep}


def network_and_inputs(name: str):
    """A small network with VCA, and a function from a batch size to its inputs."""
    if name in STEPS:
        network = STEPS[name](test_dit.small("vca"))
        return network.eval(), lambda batch: (torch.randn(batch, 4, 8, 8), torch.rand(batch), torch.arange(batch) % 5)
    network = test_classifiers.small(name, "vca", **FIELDS[name]).eval()
    return network, lambda batch: (torch.randn(batch, 3, *network.config.size),)


@pytest.mark.process
@pytest.mark.parametrize("name", [*CLASSIFIERS, *STEPS])
def test_models_export_dynamic_batch(name, tmp_path):
    """`torch.export` and ONNX Runtime equal the network at batch sizes that the export has not seen."""
    onnxruntime = pytest.importorskip("onnxruntime")
    network, inputs = network_and_inputs(name)
    example = inputs(3)
    dynamic = tuple({0: torch.export.Dim("batch", max=64)} for _ in example)
    program = torch.export.export(network, example, dynamic_shapes=dynamic)
    torch.onnx.export(program, (), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for batch in (1, 3, 8):
        given = inputs(batch)
        with torch.no_grad():
            expected = network(*given)
        torch.testing.assert_close(program.module()(*given), expected, rtol=0, atol=1e-5)
        named = {field.name: value.numpy() for field, value in zip(session.get_inputs(), given, strict=True)}
        out = torch.from_numpy(session.run(None, named)[0])
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-4)
