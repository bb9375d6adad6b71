"""docs/images.md: its experiment trains on a folder of pictures with captions, and the model describes one."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from cleangpt.environments.shapes import caption, draw_scene, picture
from tests.forked import run

PAGE = Path(__file__).parents[2] / "docs" / "images.md"


@pytest.mark.slow
def test_a_folder_of_pictures_with_captions_becomes_a_model_that_answers(workplace: Path) -> None:
    (code,) = re.findall(r"```text\n# my_pictures.py\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    Path("my_pictures.py").write_text(code, encoding="utf-8")
    Path("pictures").mkdir()
    lines = []
    for number in range(40):
        scene = draw_scene(number, held_out=False)
        Image.fromarray(picture(scene)).save(f"pictures/{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": caption(scene)}) + "\n")
    Path("pictures/metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    short = ["--training.macro-batches", "1", "--training.batches-per-macro-batch", "4"]
    trained = run("train", "my_pictures.py", "--run-dir", "runs/my_pictures", *short)
    assert trained.returncode == 0, trained.stderr
    sampled = run("sample", "runs/my_pictures", "--image", "pictures/0.png", "--max-new-tokens", "5")
    assert sampled.returncode == 0 and sampled.stdout.strip("\n"), sampled.stderr
    Path("pictures/0.png").write_bytes(b"nothing")
    refused = run("sample", "runs/my_pictures", "--image", "pictures/0.png")
    assert refused.returncode == 2 and "0.png is not a picture" in refused.stderr
