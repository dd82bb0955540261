"""What a program's own files see of CUDA while they are imported."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from fragscope.record.virtual.loading import card_in_sight  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")]
QUESTION = (
    "import torch\nseen = torch.cuda.is_available(), torch.accelerator.is_available(), torch.cuda.device_count()\n"
)


def answers(file: str) -> object:
    namespace: dict[str, object] = {}
    exec(compile(QUESTION, file, "exec"), namespace)
    return namespace["seen"]


def test_own_files_see_a_card_and_installed_packages_the_machine():
    with card_in_sight():
        assert answers("/home/me/project/loader.py") == (True, True, 1)
        assert answers("/usr/lib/python3/dist-packages/kernels/__init__.py") == (False, False, 0)
        assert answers("/home/me/.venv/lib/python3.12/site-packages/kernels/__init__.py") == (False, False, 0)
        assert answers(torch.__file__) == (False, False, 0)
        assert torch.cuda.set_device(0) is None
        assert torch.cuda.current_device() == 0
    assert answers("/home/me/project/loader.py") == (False, False, 0)


def test_own_files_may_ask_what_the_card_is():
    question = "import torch\nseen = torch.cuda.get_device_name(0), torch.cuda.get_device_capability()\n"
    question += "properties = torch.cuda.get_device_properties(0)\n"
    namespace: dict[str, object] = {}
    with card_in_sight():
        exec(compile(question, "/home/me/project/kernels.py", "exec"), namespace)
    assert namespace["seen"] == ("NVIDIA H100 80GB HBM3", (9, 0))
    assert namespace["properties"].total_memory == 85_017_493_504
