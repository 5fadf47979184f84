"""Makes the pictures of the README and of docs/ from the shipped weights.

make figures                                          # docs/figures/demo.jpg, demo-sr.jpg and demo-cassi.jpg
python docs/make_figures.py --runs LORA_RUN TIED_RUN  # also docs/figures/training-cs-25.png, from two run folders
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from pathlib import Path

from PIL import Image

from lorun_fast.apps.cli import main as lorun_fast

FIGURES = Path(__file__).resolve().parent / "figures"
WIDTH = 1000


def demo(task: str, name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        if lorun_fast(["demo", task, "-o", folder]) != 0:
            raise SystemExit("the demo failed")
        with Image.open(Path(folder) / "comparison.png") as picture:
            height = round(picture.height * WIDTH / picture.width)
            picture.convert("RGB").resize((WIDTH, height), Image.Resampling.LANCZOS).save(
                FIGURES / name, quality=85, optimize=True
            )


def training(lora: Path, tied: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for label, folder in (("LoRA stages", lora), ("tied stages", tied)):
        with (folder / "log.csv").open() as f:
            rows = [row for row in csv.DictReader(f) if row["phase"] == "stages"]
        steps = [int(row["step"]) for row in rows]
        axes.plot(steps, [float(row["validation_psnr_db"]) for row in rows], marker=".", label=label)
    axes.set(xlabel="step of phase 2", ylabel="PSNR on held-out training images (dB)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(FIGURES / "training-cs-25.png", dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", nargs=2, type=Path, metavar=("LORA", "TIED"), help="run folders of lorun-fast train")
    args = parser.parse_args()
    FIGURES.mkdir(exist_ok=True)
    demo("cs", "demo.jpg")
    demo("sr", "demo-sr.jpg")
    demo("cassi", "demo-cassi.jpg")
    if args.runs:
        training(*args.runs)


if __name__ == "__main__":
    main()
