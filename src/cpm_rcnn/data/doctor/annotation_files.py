"""What the checks of the annotation files have found."""

from collections.abc import Iterable, Sequence

from cpm_rcnn.data.doctor.checked_split import CheckedSplit
from cpm_rcnn.data.doctor.finding import Example, Finding, Severity
from cpm_rcnn.data.problem import Problem


def annotation_findings(splits: Sequence[CheckedSplit]) -> list[Finding]:
    """The invalid and the unusual entries of the annotation files."""
    found: dict[tuple[str, str, bool], Finding] = {}
    for split in splits:
        path, annotations = str(split.annotations.path), split.annotations
        for is_fault, problems in ((True, annotations.faults), (False, annotations.notes)):
            for problem in problems:
                # Two splits of one file, one of which is held out, have the same problems.
                found.setdefault((path, problem.text, is_fault), _finding(split.name, path, problem, is_fault))
    return list(found.values())


def _finding(split: str, path: str, problem: Problem, is_fault: bool) -> Finding:
    examples = tuple(Example(split, path, place) for place in problem.places)
    kind = "invalid annotations" if is_fault else "unusual annotations"
    advice = "Correct the file, or skip these entries with on_error=skip." if is_fault else ""
    severity: Severity = "fault" if is_fault else "warning"
    text = f"{problem.text[0].upper()}{problem.text[1:]}."
    return Finding(severity, kind, text, problem.count, examples, advice)


def unreadable_annotations(errors: Iterable[tuple[str, str]]) -> list[Finding]:
    """Splits whose annotations cannot be read, each as its name and why."""
    # Without the training annotations, the validation annotations have the same error.
    first = {message: split for split, message in reversed(list(errors))}
    return [
        Finding("fault", "unreadable annotations", f"{message}.", 1, (Example(split, message.partition(": ")[0]),))
        for message, split in first.items()
    ]
