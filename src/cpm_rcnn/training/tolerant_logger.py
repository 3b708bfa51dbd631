"""A logger that may fail without taking the training with it."""

import logging
from argparse import Namespace
from typing import Any

from pytorch_lightning.loggers import Logger

from cpm_rcnn.errors import UserError

_log = logging.getLogger(__name__)


class TolerantLogger(Logger):
    """Hands everything on to another logger, until that fails; then says so once and goes quiet.

    What fails before the training starts (no account, no folder) is an error, as there is nothing to lose yet.

    Args:
        logger: the one that may fail.
    """

    def __init__(self, logger: Logger) -> None:
        super().__init__()
        self.logger = logger
        self._quiet = False

    @property
    def name(self) -> str | None:
        """Of the logger within."""
        return self.logger.name

    @property
    def version(self) -> int | str | None:
        """Of the logger within."""
        return self.logger.version

    @property
    def save_dir(self) -> str | None:
        """Of the logger within."""
        return self.logger.save_dir

    @property
    def experiment(self) -> Any:
        """What the logger within writes to; Lightning asks for it before the training starts.

        Raises:
            UserError: it cannot be had.
        """
        try:
            return getattr(self.logger, "experiment", None)
        except Exception as error:  # every service has errors of its own
            kind = type(self.logger).__name__
            raise UserError(f"logger: {kind} cannot start ({type(error).__name__}: {_line(error)})") from error

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log numbers by name."""
        self._try("log_metrics", metrics, step)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Log what the run was given."""
        self._try("log_hyperparams", params, *args, **kwargs)

    def save(self) -> None:
        """Write what is in memory."""
        self._try("save")

    def finalize(self, status: str) -> None:
        """Close."""
        self._try("finalize", status)

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """Hand on that a checkpoint was written."""
        self._try("after_save_checkpoint", checkpoint_callback)

    def _try(self, method: str, *args: Any, **kwargs: Any) -> None:
        if self._quiet:
            return
        try:
            getattr(self.logger, method)(*args, **kwargs)
        except Exception as error:  # every service has errors of its own
            self._quiet = True
            what = f"{type(self.logger).__name__} failed ({type(error).__name__}: {_line(error)})"
            _log.warning("logger: %s; training goes on without it", what)


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
