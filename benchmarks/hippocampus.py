"""How good is small guided attention on the hippocampus, beside MONAI's U-Net of equal size, in five-fold cross-validation?

Every fold of both configurations is trained (an interrupted one goes on where it stopped) and tested on its own fold, whose scans chose nothing: the
checkpoint is the one that was best on six scans of the other folds. Dice and HD95 of every scan on its own grid; a missed structure counts with the
scan's diagonal.

python benchmarks/hippocampus.py [--folds 0 1 2 3 4] [--networks guided unet] [--runs runs] [--steps N] writes benchmarks/results/hippocampus.json
after every fold.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from foveal.core.cli import FovealCLI
from foveal.core.run_folder import newest_checkpoint, run_of
from foveal.kernels.bench import machine

ROOT = Path(__file__).parents[1]
CONFIGS = {"guided": "hippocampus_small", "unet": "hippocampus_unet"}
RESULT = Path(__file__).parent / "results" / "hippocampus.json"
STRUCTURES = ("anterior", "posterior")


def trained_and_tested(network: str, fold: int, runs: Path, root: str | None, steps: int | None) -> dict[str, Any]:
    """Figures of one fold."""
    config, experiment = ROOT / "configs" / "medical" / f"{CONFIGS[network]}.yaml", f"{CONFIGS[network]}_fold{fold}"
    common = ["--config", str(config), "--runs", str(runs), "--experiment", experiment, "--data.init_args.fold", str(fold)]
    common += [] if root is None else ["--data.init_args.root", root]
    started = time.process_time()
    limit = [] if steps is None else ["--trainer.max_steps", str(steps)]
    fitted = FovealCLI("medical", ["fit", *common, *limit, "--ckpt_path", "last", "--trainer.enable_model_summary", "false"])
    seconds = time.process_time() - started
    best = newest_checkpoint(runs, "medical", experiment, "best.ckpt")
    assert best is not None, "a fit with validation leaves a best checkpoint"
    tested = FovealCLI("medical", ["test", *common, "--ckpt_path", str(best), "--trainer.enable_progress_bar", "false"])
    assert tested.run_folder is not None
    cases = pd.read_csv(tested.run_folder / "cases.csv")
    parameters = sum(parameter.numel() for parameter in fitted.model.network.parameters())
    figures: dict[str, Any] = {
        "scans": len(cases), "missed": int(cases["missed"].sum()), "parameters": parameters, "steps": fitted.trainer.global_step,
        "training_cpu_seconds_of_the_last_process": round(seconds), "run": str(run_of(best).name if run_of(best) else best),
    }  # fmt: skip
    for structure in STRUCTURES:
        figures[f"dice {structure}"] = round(float(cases[f"dice {structure}"].mean()), 4)
        figures[f"hd95 {structure} (mm)"] = round(float(cases[f"hd95 {structure} (mm)"].mean()), 3)
    figures["dice"] = round(float(np.mean([figures[f"dice {structure}"] for structure in STRUCTURES])), 4)
    figures["hd95 (mm)"] = round(float(np.mean([figures[f"hd95 {structure} (mm)"] for structure in STRUCTURES])), 3)
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--networks", nargs="+", default=list(CONFIGS), choices=list(CONFIGS))
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--root", help="folder of the corpus, where it is not the configurations'")
    parser.add_argument("--steps", type=int, help="of each training, instead of the configurations'")
    asked = parser.parse_args()
    for number in asked.folds:
        for name in asked.networks:
            figures = trained_and_tested(name, number, asked.runs, asked.root, asked.steps)
            # Read anew: another process may have measured other folds meanwhile.
            report: dict[str, Any] = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {"folds": {}}
            report["folds"].setdefault(f"fold {number}", {})[name] = figures
            report["folds"] = dict(sorted(report["folds"].items()))
            report["machine"] = machine()
            for measure in ("dice", "hd95 (mm)"):
                report[f"mean {measure}"] = {
                    each: round(float(np.mean([fold[each][measure] for fold in report["folds"].values() if each in fold])), 4)
                    for each in CONFIGS
                    if any(each in fold for fold in report["folds"].values())
                }
            RESULT.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            print(f"fold {number} {name}: {figures}", flush=True)
