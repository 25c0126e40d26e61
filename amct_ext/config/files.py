"""Configuration files of either format."""

from __future__ import annotations

import os
from pathlib import Path

from amct_ext.config.json import JsonConfig, read_json
from amct_ext.config.plan_checks import check_enabled, check_without_model
from amct_ext.config.text import RetrainConfig, parse_config


def check_config(path: str | os.PathLike[str]) -> None:
    """Read a text or a JSON configuration and check all that needs no model. Errors: those of reading; ConfigError."""
    config = read_config(path)
    if isinstance(config, JsonConfig):
        check_enabled(config)
    check_without_model(config.settings if isinstance(config, JsonConfig) else config)


def read_config(path: str | os.PathLike[str]) -> RetrainConfig | JsonConfig:
    """Read a text or a JSON configuration, told apart by the brace that only JSON begins with. Errors: of either."""
    is_json = Path(path).read_bytes().lstrip()[:1] == b"{"
    return read_json(path) if is_json else parse_config(path)
