"""Every `python generate.py` command of the pages runs: hub ids become tiny checkpoints of the same
family, files become small ones of the same kind; everything else is taken word for word."""

import io
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_intern
import tiny_qwen
from PIL import Image
from video_files import encode, pictures

import generate

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
STANDS_FOR = {  # part of a hub id -> tiny checkpoint
    "llava-1.5": "llava",
    "llava-v1.6-mistral": "llava_next_mistral",
    "LLaVA-NeXT-Video": "llava_next_video",
    "llava-onevision-qwen2-0.5b": "llava_onevision_tied",
    "llava-onevision-qwen2-7b": "llava_onevision",
    "LLaVA-Video": "original_video",
    "LongVA": "original_longva",
    "InternVL3-": "intern:intern3",
    "InternVL3_5": "intern:intern35",
    "Qwen2-VL": "qwen:Qwen2VL",
    "Qwen2.5-VL": "qwen:Qwen2_5_VL",
}
FAMILIES = {"intern": tiny_intern, "qwen": tiny_qwen}  # those with tests of their own
COMMAND = re.compile(r"python generate\.py [^\n`|]*")


def commands() -> list[str]:
    """Each command once, comments cut off, chats and placeholders left out."""
    found = {m.split("   #")[0].strip() for p in PAGES for m in COMMAND.findall(p.read_text())}
    return sorted(c for c in found if " -p " in c and "MODEL" not in c)


def test_there_are_commands_for_every_family() -> None:
    text = " ".join(commands())
    assert all(part in text for part in STANDS_FOR)


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg makes the clips")
@pytest.mark.parametrize("command", commands())
def test_command(
    command: str, oracle: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    words = shlex.split(command)[2:]
    if "--method" in words and ".py:" in words[words.index("--method") + 1]:
        i = words.index("--method") + 1
        words[i] = str(ROOT / words[i])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    for word in words:
        if word.endswith(".mp4"):
            encode(tmp_path / word, pictures(6), ["-c:v", "libx264"])
        elif word.endswith((".jpg", ".png")):
            Image.fromarray(np.full((40, 60, 3), 90, np.uint8)).save(tmp_path / word)
    if "-m" in words:
        i = words.index("-m") + 1
        kind = next(kind for part, kind in STANDS_FOR.items() if part in words[i])
        family, _, name = kind.rpartition(":")
        if family:
            FAMILIES[family].build(name, tmp_path / "model")
        words[i] = str(tmp_path / "model" if family else oracle(kind).folder)
    else:
        words += ["-m", str(oracle("llava_onevision").folder)]
    if "--frames" in words:
        words[words.index("--frames") + 1] = "4"
    if "--open" in words:  # what the command before it on its page has saved
        encode(tmp_path / "seen.mp4", pictures(6), ["-c:v", "libx264"])
        kept = ["-v", "seen.mp4", "--frames", "4", "-p", "What?", "--max-new-tokens", "2", "--save"]
        assert generate.main([*kept, words[words.index("--open") + 1], *words[-2:]]) == 0
    assert generate.main([*words, "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().out.strip()
