"""Sound in numbers: the constants of the log-mel front end of Gemma 4, and how many frames a clip has.

Formulas: transformers `feature_extraction_gemma4.py` (Gemma4AudioFeatureExtractor). A frame is two hops of samples long
and starts one hop after the frame before it; in front of the clip stands one hop of silence. Frame i is therefore hops
i - 1 and i of the clip, and only frames are kept that end before the clip's last sample.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

__all__ = ["FRAME_COUNTS", "hann_window", "log_mel_frames", "mel_filters", "soft_token_count", "windowed_fourier"]


def log_mel_frames(samples: int, hop: int) -> int:
    """Number of frames of a clip: those behind which there is at least one more sample."""
    return max(samples - 1, 0) // hop


def raw_frames(samples: int, step: int) -> int:
    """Number of frames of `step` samples each that hold all samples of a clip."""
    return -(-samples // step)


# By policy: (samples, samples from frame to frame) -> frames.
FRAME_COUNTS: dict[str, Callable[[int, int], int]] = {"log_mel": log_mel_frames, "frames": raw_frames}


def soft_token_count(frames: int, frames_per_token: int) -> int:
    """Number of soft tokens of so many frames. A convolution of stride 2 halves, rounding up, once for each factor 2;
    that is one division by their product, rounding up."""
    return -(-frames // frames_per_token)


def hann_window(length: int) -> npt.NDArray[np.float32]:
    """The periodic Hann window 0.5 - 0.5 cos(2 pi n / length), rounded to float32 as the published front end does."""
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / length)).astype(np.float32)


def windowed_fourier(window: npt.NDArray[np.floating], points: int) -> npt.NDArray[np.float64]:
    """float64 [length, 2 bins]: frames times this are the real parts, then the negated imaginary parts, of the discrete
    Fourier transform of the windowed frames filled up to `points` with zeros; bins = points / 2 + 1."""
    # The product is reduced modulo the number of points before it becomes an angle: large angles lose digits.
    turns = np.outer(np.arange(len(window)), np.arange(points // 2 + 1)) % points
    angles = 2 * np.pi * turns / points
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1) * window.astype(np.float64)[:, None]


def mel_filters(bins: int, filters: int, rate: int) -> npt.NDArray[np.float64]:
    """float64 [bins, filters]: triangles whose corners are evenly spaced on the HTK mel scale, 2595 log10(1 + f / 700),
    from 0 to rate / 2 hertz, and whose sides are straight in hertz; their peaks are 1.

    A triangle so narrow that no bin falls inside is zero everywhere.
    """
    highest = 2595 * np.log10(1 + rate / 2 / 700)
    corners = 700 * (10 ** (np.linspace(0, highest, filters + 2) / 2595) - 1)
    frequencies = np.linspace(0, rate / 2, bins)[:, None]
    left, peak, right = corners[:-2], corners[1:-1], corners[2:]
    rising, falling = (frequencies - left) / (peak - left), (right - frequencies) / (right - peak)
    return np.maximum(0, np.minimum(rising, falling))
