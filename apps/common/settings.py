"""All settings in one typed place: environment `TRISCOPE_*`, then a TOML file, then defaults.

The file is `TRISCOPE_CONFIG`, or `triscope.toml` in the working folder, or in TRISCOPE_HOME.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
import platformdirs

from apps.common.errors import SettingsError

PREFIX = "TRISCOPE_"
CONFIG_VARIABLE = "TRISCOPE_CONFIG"
SECRET_NAMES = ("password", "secret", "token", "credential")


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One field a setting; the environment variable is its name in capitals after `TRISCOPE_`."""

    home: str = ""
    """Everything that a default installation writes."""
    log_url: str = ""
    """`embedded:///DIR[?keep_days=DAYS]` or `kafka://[USER:PASSWORD@]HOST:PORT[,...][?cafile=FILE...]` (`docs/how-to/deploy.md`)."""
    database_url: str = ""
    """An SQLAlchemy address: `sqlite:///FILE` or `postgresql+psycopg://USER:PASSWORD@HOST/NAME`."""
    blob_url: str = ""
    """A folder `file:///DIR`, or `s3://BUCKET/PREFIX` with the extra `s3`."""
    state_url: str = ""
    """Where keyed state of the stream processors lives: `embedded:///DIR`."""
    data_dir: str = ""
    """Real data sets, for tests and benchmarks only."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What models run on; a device that is missing is an error."""
    threads: int = 0
    """CPU threads of a model; 0 takes every usable core."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"
    ui_address: str = "127.0.0.1"
    """Where the pages listen."""
    ui_port: int = 8501
    metrics_address: str = "127.0.0.1"
    """Where a worker serves `/metrics`."""
    metrics_port: int = 0
    """Port of a worker's `/metrics` for Prometheus; 0 serves none."""
    dicom_address: str = "127.0.0.1"
    """Where `triscope medical listen` receives C-STORE."""
    dicom_port: int = 11112
    dicom_ae_title: str = "TRISCOPE"
    dicom_allowed_ae_titles: str = ""
    """Calling AE titles that may store, separated by commas; empty allows every one."""
    finance_currencies: str = "EUR"
    """Currencies of `finance.transactions` that are accepted, separated by commas; the models know amounts in one."""
    industrial_keep_days: float = 0.0
    """Days after which the station deletes pictures of parts that passed and on which no one decided; 0 keeps them."""
    dicom_quiet_seconds: float = 3.0
    """How long a series must be silent before it counts as complete."""

    @property
    def home_path(self) -> Path:
        """`home` as a path."""
        return Path(self.home)

    @property
    def model_threads(self) -> int | None:
        """`threads`, or None for every usable core."""
        return self.threads or None


class Loaded(msgspec.Struct, frozen=True):
    """Settings and, for each, where its value came from."""

    settings: Settings
    origin: dict[str, str]


def known_keys() -> list[str]:
    """The names of all settings."""
    return [field.name for field in msgspec.structs.fields(Settings)]


def load_settings(environment: Mapping[str, str] | None = None) -> Loaded:
    """Read settings. Raises SettingsError for an unknown key (naming the nearest) or an unusable value."""
    env = os.environ if environment is None else environment
    given: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for key, value, source in (*_from_file(env), *_from_environment(env)):
        if key not in known_keys():
            near = difflib.get_close_matches(key, known_keys(), 1, 0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known settings: {', '.join(known_keys())}"
            raise SettingsError(f"unknown setting {key!r} from {source}; {hint}")
        given[key], origin[key] = value, source
    try:
        settings = msgspec.convert(given, Settings, strict=False)
    except msgspec.ValidationError as error:
        field = (re.search(r"\$\.(\w+)", str(error)) or [None, ""])[1]
        shown = masked(str(field), given.get(str(field), ""))
        raise SettingsError(f"setting {field!r} from {origin.get(str(field), '?')} is {shown!r}: {error}") from error
    return Loaded(_with_defaults(settings), origin)


def _from_environment(env: Mapping[str, str]) -> list[tuple[str, Any, str]]:
    names = sorted(name for name in env if name.startswith(PREFIX) and name != CONFIG_VARIABLE)
    return [(name.removeprefix(PREFIX).lower(), env[name], f"environment {name}") for name in names if env[name] != ""]


def _from_file(env: Mapping[str, str]) -> list[tuple[str, Any, str]]:
    named = env.get(CONFIG_VARIABLE)
    home = Path(env.get("TRISCOPE_HOME") or _default_home())
    path = Path(named) if named else next((p for p in (Path("triscope.toml"), home / "triscope.toml") if p.is_file()), None)
    if path is None:
        return []
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"the settings file {path} can't be read: {error}; correct it or unset {CONFIG_VARIABLE}") from error
    return [(key, value, f"file {path}") for key, value in content.items()]


def _default_home() -> str:
    return str(platformdirs.user_data_path("triscope", appauthor=False))


def _with_defaults(settings: Settings) -> Settings:
    """Addresses that were not given lie below `home`."""
    home = Path(settings.home or _default_home()).expanduser().absolute()
    return msgspec.structs.replace(
        settings,
        home=str(home),
        log_url=settings.log_url or f"embedded://{_in_address(home)}/log",
        database_url=settings.database_url or f"sqlite:///{_in_address(home)}/triscope.sqlite",
        blob_url=settings.blob_url or f"file://{home}/blobs",
        state_url=settings.state_url or f"embedded://{_in_address(home)}/state",
    )


def _in_address(folder: Path) -> str:
    """A folder as it stands in an address, where `%`, `?` and `#` have meanings of their own."""
    return re.sub("[%?#]", lambda found: f"%{ord(found[0]):02X}", str(folder))


def masked(name: str, value: object) -> str:
    """`value` for the eye: passwords in addresses and settings that are secrets become `***`."""
    text = str(value)
    if text and any(part in name.lower() for part in SECRET_NAMES):
        return "***"
    return re.sub(r"(?<=://)([^/@:]*):([^@]*)@", r"\1:***@", text)
