"""These tests compare with other people's code, and skip where it is not installed."""

import pytest

pytest.importorskip("torch", reason="parity is measured against PyTorch: pip install torch")
