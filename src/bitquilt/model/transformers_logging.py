"""`quiet_transformers` keeps transformers from printing warnings and progress bars of its own."""


class quiet_transformers:
    """Within the block, transformers logs errors only and draws no progress bars."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self._logging = logging
        self._level, self._bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        self._logging.set_verbosity(self._level)
        if self._bars:
            self._logging.enable_progress_bar()
