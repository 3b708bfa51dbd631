"""``python -m cpm_rcnn.compare RUN RUN ...``: compare evaluations of two or more models on the same images."""

from omegaconf import DictConfig

from cpm_rcnn.cli.config import as_path, to_dict
from cpm_rcnn.cli.main import run
from cpm_rcnn.errors import UserError, check_count, check_file, check_list, check_path


def compare(config: DictConfig) -> None:
    """Compare evaluations; the results are written to Hydra's output folder."""
    sources = to_dict(config)["runs"]
    check_list("runs", sources)
    if len(sources) < 2:
        raise UserError("runs: give two or more folders of eval, for example outputs/eval_a outputs/eval_b")
    check_count("samples", config.samples)
    check_count("seed", config.seed, 0, 2**32 - 1)
    annotations = None if config.annotations is None else check_file("annotations", as_path(config.annotations))
    paths = [check_path("runs", as_path(source)) for source in sources]
    # Imported after the checks, because it imports torch, which takes seconds.
    from cpm_rcnn.commands.compare import compare_runs

    compare_runs(paths, annotations, config.samples, config.seed)


def main() -> None:
    run(compare, "compare")


if __name__ == "__main__":
    main()
