"""Settings every test shares."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from hypothesis import settings

settings.register_profile("decant", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("decant")
