"""Device profiles: the shipped ones, a user's file, and what is said of a wrong one."""

import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

from memplan.devices import known_profiles, profile_for
from memplan.errors import OptionError


@pytest.mark.parametrize("name", known_profiles())
def test_shipped_profiles_are_whole(name: str) -> None:
    profile = profile_for(name)
    assert profile.name == name and profile.kind in ("cpu", "cuda") and profile.source
    assert profile.memory > 1e9 and profile.bandwidth > 1e9
    assert profile.granularity == {"cpu": 64, "cuda": 512}[profile.kind]
    assert {"float32", "bfloat16", "float16", "float64"} <= set(profile.flops)
    assert set(profile.links) == {"host", "disk"}
    assert hash(profile) == hash(profile_for(name))


def test_the_named_devices_are_there() -> None:
    assert {"h100-80gb", "h200-141gb", "a100-80gb", "rtx4090-24gb", "cpu"} <= set(known_profiles())


def test_a_users_file(tmp_path: Path) -> None:
    text = (resources.files("memplan") / "profiles" / "a100-80gb.toml").read_text()
    file = tmp_path / "a100-40gb.toml"
    file.write_text(text.replace("80_000_000_000", "40_000_000_000"))
    profile = profile_for(str(file))
    assert (profile.name, profile.memory) == ("a100-40gb", 40_000_000_000)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kind = 'cuda'", "needs the key"),
        ("kind = ", "not TOML"),
        (
            "kind='cuda'\nmemory=1\nbandwidth=-1\nlaunch=1\ngranularity=1\n[flops]\nfloat32=1",
            "bandwidth must be positive",
        ),
    ],
)
def test_a_wrong_file_is_refused_with_its_place(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(OptionError, match=said) as caught:
        profile_for(str(file))
    assert str(file) in str(caught.value)


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(OptionError, match="h100-80gb"):
        profile_for("h100")
    with pytest.raises(OptionError, match="cannot read"):
        profile_for("/nowhere/device.toml")


def test_profiles_load_without_torch() -> None:
    code = "import sys; from memplan.devices import profile_for; profile_for('cpu'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
