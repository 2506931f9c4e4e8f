"""What the parts promise, as tests; the whole is tested in test_sd.py."""

import pytest

pytest.register_assert_rewrite("tests.reference")  # before it is imported
