"""Listing teachers must answer at once."""

import subprocess
import sys


def test_importing_the_room_loads_no_heavy_library():
    heavy = "{'torch', 'diffusers', 'huggingface_hub'}"
    code = f"import sys, teachers; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
