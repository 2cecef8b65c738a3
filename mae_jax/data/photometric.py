"""Photometric distortion on the host, one picture at a time: what segmentation trains on.

As mmsegmentation's PhotoMetricDistortion, which follows SSD (arXiv 1512.02325, section 2.2).
"""

import cv2
import numpy as np

BRIGHTNESS = 32.0  # grey levels added at most
CONTRAST = (0.5, 1.5)  # factor, of saturation too
HUE = 18  # steps turned at most, of the 180 that OpenCV divides the circle into


def photometric_distortion(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Changes brightness, contrast, saturation and hue of a picture, uint8 [H, W, 3] RGB.

    In this order, or with the contrast last; each with a chance of a half. After every one pixels
    are whole numbers again, cut off.
    """

    def chance() -> bool:
        return bool(rng.integers(2))

    def scaled(values: np.ndarray, factor: float = 1.0, shift: float = 0.0) -> np.ndarray:
        table = np.arange(256, dtype=np.float32) * np.float32(factor) + np.float32(shift)
        return cv2.LUT(values, np.clip(table, 0, 255).astype(np.uint8))

    if chance():
        image = scaled(image, shift=rng.uniform(-BRIGHTNESS, BRIGHTNESS))
    contrast_last = chance()
    if not contrast_last and chance():
        image = scaled(image, rng.uniform(*CONTRAST))
    if chance():
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[..., 1] = scaled(np.ascontiguousarray(hsv[..., 1]), rng.uniform(*CONTRAST))
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if chance():
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[..., 0] = (hsv[..., 0].astype(np.int32) + rng.integers(-HUE, HUE)) % 180
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if contrast_last and chance():
        image = scaled(image, rng.uniform(*CONTRAST))
    return image
