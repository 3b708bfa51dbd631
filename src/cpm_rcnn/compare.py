"""``python -m cpm_rcnn.compare RUN RUN ...``: compare evaluations of two or more models on the same images."""

import os
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from cpm_rcnn.cli.config import as_path, to_dict
from cpm_rcnn.cli.main import run
from cpm_rcnn.errors import UserError, check_count, check_file, check_list, check_path
from cpm_rcnn.evaluation.bootstrap import compare_matches, match_all
from cpm_rcnn.evaluation.records import DETECTIONS, check_comparable, class_names, read_detections, read_evaluation
from cpm_rcnn.reporting.comparison import print_comparison, write_comparison


def compare(config: DictConfig) -> None:
    """Compare evaluations; the results are written to Hydra's output folder."""
    sources = to_dict(config)["runs"]
    check_list("runs", sources)
    if len(sources) < 2:
        raise UserError("runs: give two or more folders of eval, for example outputs/eval_a outputs/eval_b")
    check_count("samples", config.samples)
    check_count("seed", config.seed, 0, 2**32 - 1)
    given = None if config.annotations is None else check_file("annotations", as_path(config.annotations)).absolute()
    evaluations = [read_evaluation(check_path("runs", as_path(source)), given) for source in sources]
    annotations = check_comparable(evaluations)
    classes = class_names(evaluations[0], annotations)
    data = [read_detections(evaluation, annotations) for evaluation in evaluations]
    results = compare_matches([match_all(each) for each in data], classes, config.samples, config.seed)
    comparison = {
        "annotations": str(evaluations[0].annotations),
        "images": data[0].images,
        "samples": config.samples,
        "seed": config.seed,
        "confidence": 0.95,
        "runs": [
            {"name": name, "source": str(evaluation.source.absolute()), **result}
            for name, evaluation, result in zip(_names(sources), evaluations, results)
        ],
    }
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    write_comparison(comparison, run_dir)
    print_comparison(comparison)
    print(run_dir)


def _names(sources: list[str]) -> list[str]:
    """The names of the folders; if several are equal, their paths without the folders that all have in common."""
    paths = [Path(source).expanduser().absolute() for source in sources]
    paths = [path.parent if path.name == DETECTIONS else path for path in paths]
    names = [path.name for path in paths]
    if len(set(names)) == len(names):
        return names
    if len(set(paths)) == len(paths):
        common = os.path.commonpath([path.parent for path in paths])
        return [os.path.relpath(path, common) for path in paths]
    return [f"{number}: {name}" for number, name in enumerate(names, start=1)]


def main() -> None:
    run(compare, "compare")


if __name__ == "__main__":
    main()
