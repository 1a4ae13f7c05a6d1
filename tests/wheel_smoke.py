"""Use the built wheel from another folder, as `.ci/run` does: import, forward, backward.

Needs the standard library, torch and vqssl only. It is a script; pytest does not collect it.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

import vqssl


def check_installation() -> None:
    package = Path(vqssl.__file__).parent
    assert package.parent.name == "site-packages", f"vqssl was imported from {package}, not from the wheel"
    assert (package / "py.typed").is_file(), "py.typed is missing, so type checkers ignore the annotations"
    for name in ("monai", "kornia", "sklearn", "matplotlib", "pytest", "torchvision"):
        assert importlib.util.find_spec(name) is None, f"the wheel installed {name}, which is not a dependency"
    for name in ("tests", "examples", "docs", "benchmarks"):
        spec = importlib.util.find_spec(name)
        assert spec is None, f"the wheel installed a top-level {name}: {spec}"


def check_modules() -> None:
    torch.manual_seed(0)
    views, batch, dim, codes = 2, 4, 16, 8

    x = torch.randn(batch, 10, dim, requires_grad=True)
    codebook = vqssl.EMACodebook(codebook_size=codes, dim=dim)
    quantized, indices, commitment = codebook(x)
    assert quantized.shape == x.shape
    assert indices.shape == x.shape[:-1]
    assert indices.dtype == torch.int64
    (quantized.square().mean() + commitment).backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()

    student = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(dim))
    images = torch.randn(views, batch, 1, 12, 12)
    student(images[0])
    teacher = vqssl.MomentumTeacher(student)
    quantizer = vqssl.MultiScaleQuantizer(in_channels=[6], codebook_size=codes, dim=dim)
    fusion = vqssl.SERFFusion(dim, num_scales=1)
    objective = vqssl.DiSSECTObjective()

    predictions, targets, refined, commitments = [], [], [], []
    for view in images:
        predictions.append(student(view))
        scales = quantizer([student[1](student[0](view))])
        commitments.append(scales.commitment_loss)
        target = teacher(view)
        targets.append(target)
        refined.append(fusion(target, scales.quantized))
    loss = objective(predictions, targets, refined, torch.stack(commitments).mean())
    loss.total.backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, f"{name} got no gradient"
        assert parameter.grad.isfinite().all(), f"the gradient of {name} is not finite"
    teacher.update_(student)


def check_import_time() -> None:
    """Check the time of `import vqssl` beyond torch's own: the best of five, as other processes may use the machine."""
    code = "import time, torch; start = time.perf_counter(); import vqssl; print(time.perf_counter() - start)"
    command = [sys.executable, "-I", "-c", code]
    best = min(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(5))
    print(f"import vqssl: {best:.2f} s beyond torch")
    assert best < 0.3, "import vqssl is slow: run python -X importtime -c 'import vqssl'"


if __name__ == "__main__":
    check_installation()
    check_modules()
    check_import_time()
    print(f"vqssl {vqssl.__version__} from {Path(vqssl.__file__).parent}: the wheel works")
