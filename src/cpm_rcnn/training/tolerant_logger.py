"""A logger whose failure does not end the training."""

import logging
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from pytorch_lightning.loggers import Logger

from cpm_rcnn.errors import UserError

_log = logging.getLogger(__name__)


class TolerantLogger(Logger):
    """Forwards all calls to another logger until one fails; then it warns once and ignores further calls.

    A failure before the training starts (for example, no account or no folder) is an error.

    Args:
        logger: the logger that may fail.
    """

    def __init__(self, logger: Logger) -> None:
        super().__init__()
        self.logger = logger
        self._failed = False

    @property
    def name(self) -> str | None:
        return self.logger.name

    @property
    def version(self) -> int | str | None:
        return self.logger.version

    @property
    def save_dir(self) -> str | None:
        return self.logger.save_dir

    @property
    def experiment(self) -> Any:
        """The wrapped logger's experiment; Lightning asks for it before the training starts.

        Raises:
            UserError: the wrapped logger cannot start.
        """
        try:
            return getattr(self.logger, "experiment", None)
        except Exception as error:  # each service raises its own errors
            kind = type(self.logger).__name__
            raise UserError(f"logger: {kind} cannot start ({type(error).__name__}: {_line(error)})") from error

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.attempt(lambda logger: logger.log_metrics(metrics, step))

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        self.attempt(lambda logger: logger.log_hyperparams(params, *args, **kwargs))

    def save(self) -> None:
        self.attempt(lambda logger: logger.save())

    def finalize(self, status: str) -> None:
        self.attempt(lambda logger: logger.finalize(status))

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        self.attempt(lambda logger: logger.after_save_checkpoint(checkpoint_callback))

    def attempt(self, call: Callable[..., Any], *args: Any) -> None:
        """Call ``call(logger, *args)`` with the wrapped logger, unless it has failed before; a failure is a warning."""
        if self._failed:
            return
        try:
            call(self.logger, *args)
        except Exception as error:  # each service raises its own errors
            self._failed = True
            what = f"{type(self.logger).__name__} failed ({type(error).__name__}: {_line(error)})"
            _log.warning("logger: %s; training continues without it", what)


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
