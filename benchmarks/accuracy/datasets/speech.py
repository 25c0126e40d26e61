"""Speech under noise: sentences spoken by espeak-ng, mixed with seven kinds of noise, as sequences of chunks."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import wave
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.accuracy.datasets.packages import MissingDataError, docstrings

CHUNKS, CHUNK, CONTEXT = 48, 512, 64
RATE = 16_000
_LANGUAGES = ("en-us", "en-gb", "en-gb-scotland", "de", "fr", "es", "it", "pt")
_SPEAKERS = (*(f"m{k}" for k in range(1, 8)), *(f"f{k}" for k in range(1, 5)))

Samples = NDArray[np.float32]


def _to_16_khz(signal: Tensor) -> Tensor:
    """From 22.05 kHz by a windowed sinc."""
    at = torch.arange(int(len(signal) * 320 / 441)) * 441 / 320
    near = at.long()[:, None] + torch.arange(-15, 17)
    far = (near - at[:, None]) * 320 / 441
    kernel = torch.sinc(far) * (0.5 + 0.5 * torch.cos(math.pi * far.clamp(-11.6, 11.6) / 11.6)) * 320 / 441
    return (signal[near.clamp(0, len(signal) - 1)] * kernel).sum(1)


def _say(voice: str, text: str, speed: int, pitch: int, path: Path) -> Samples:
    if shutil.which("espeak-ng") is None:
        raise MissingDataError("espeak-ng is not installed (Debian package espeak-ng)")
    command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "-w", str(path), text]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    with wave.open(str(path)) as file:
        signal = np.frombuffer(file.readframes(file.getnframes()), np.int16).astype(np.float32) / 32768
    path.unlink()
    return _to_16_khz(torch.from_numpy(signal.copy())).numpy()


def _noise(length: int, random: np.random.Generator) -> Samples:
    """White, red, deep red, differentiated, hum, notes or clicks, of unit variance."""
    kind = random.integers(7)
    time = np.arange(length) / RATE
    signal = random.normal(size=length)

    def low_pass(x: NDArray[np.float64], pole: float) -> NDArray[np.float64]:
        return np.convolve(x, pole ** np.arange(200))[:length]

    if kind in (1, 2):
        signal = low_pass(signal, 0.97)
        signal = low_pass(signal, 0.8) if kind == 2 else signal
    elif kind == 3:
        signal = np.diff(signal, prepend=0)
    elif kind == 4:
        base = random.choice([50, 60, 100, 120, 400, 1000]) * random.uniform(0.97, 1.03)
        tones = (np.sin(2 * np.pi * base * k * time + random.uniform(0, 6)) / k for k in range(1, 7))
        signal = 0.1 * signal + sum(tones)
    elif kind == 5:
        signal = 0.03 * signal
        for start in range(0, length, 4000):
            base, part = 220 * 2 ** (random.integers(0, 24) / 12), time[start : start + 4000]
            note = sum(np.sin(2 * np.pi * base * k * part) / k**1.5 for k in range(1, 8))
            signal[start : start + 4000] += note * np.exp(-np.arange(len(part)) / 2500)
    elif kind == 6:
        signal = 0.1 * signal
        for start in random.integers(0, length, length // 4000):
            part = signal[start : start + 300]
            part += random.normal(size=len(part)) * np.exp(-np.arange(len(part)) / 80) * 5
    return (signal / signal.std()).astype(np.float32)


def _spoken(length: int, sentences: list[Samples], random: np.random.Generator) -> Samples:
    """Pieces of sentences with pauses between them; 15 % of the sequences have none."""
    clean = np.zeros(length, np.float32)
    at = int(random.integers(-8000, 12000)) if random.random() < 0.85 else length
    while at < length:
        sentence = sentences[random.integers(len(sentences))]
        begin = int(random.integers(0, max(1, len(sentence) - 8000)))
        piece = sentence[begin : begin + int(random.integers(4000, 20000))]
        low, high = max(at, 0), min(at + len(piece), length)
        if high > low:
            clean[low:high] += piece[low - at : high - at]
        at += len(piece) + int(random.integers(3000, 16000))
    return clean


def _sequences(
    count: int, voices: list[str], texts: list[str], seed: int, folder: Path
) -> tuple[NDArray[np.float16], Samples]:
    """``count`` sequences of 48 chunks; a chunk is speech (1.0) where the clean signal is louder than 0.012."""
    random = np.random.default_rng(seed)
    length = CHUNKS * CHUNK + CONTEXT
    orders = [
        (voice, texts[random.integers(len(texts))], int(random.integers(130, 210)), int(random.integers(20, 80)))
        for voice in voices * 6
    ]
    sentences = [_say(*order, folder / "spoken.wav") for order in orders]
    signals, labels = np.zeros((count, length), np.float16), np.zeros((count, CHUNKS), np.float32)
    for i in range(count):
        clean = _spoken(length, sentences, random)
        loud = clean[np.abs(clean) > 0.005]
        level = np.sqrt((loud**2).mean()) if len(loud) else 0.1
        mixed = clean + _noise(length, random) * level * 10 ** (-random.uniform(-8, 20) / 20)
        signals[i] = mixed * 10 ** (random.uniform(-14, 6) / 20)
        labels[i] = np.sqrt((clean[CONTEXT:].reshape(CHUNKS, CHUNK) ** 2).mean(1)) > 0.012
    return signals, labels


def speech(folder: Path) -> dict[str, NDArray[np.float16] | Samples]:
    """1,200 sequences of 60 voices for training (``x``, ``y``), 320 of 24 others for the test (``xt``, ``yt``).

    The folder takes passing files.
    """
    texts = [s for text in docstrings() for s in re.findall(r"[A-Z][a-z ,]{60,160}\.", text)]
    voices = [f"{language}+{speaker}" for language in _LANGUAGES for speaker in _SPEAKERS]
    np.random.default_rng(1).shuffle(voices)
    x, y = _sequences(1200, voices[:60], texts, 10, folder)
    xt, yt = _sequences(320, voices[60:84], texts, 11, folder)
    return {"x": x, "y": y, "xt": xt, "yt": yt}


def spectrum(signals: Tensor, kernel: Tensor) -> Tensor:
    """The short-time spectrum that Silero VAD reads, (sequences, chunks, 129, 4), by its own kernel."""
    parts = []
    for chunks in signals.unfold(1, CHUNK + CONTEXT, CHUNK).split(64):
        padded = F.pad(chunks.flatten(0, 1).unsqueeze(1), (0, CONTEXT), mode="reflect")
        transformed = F.conv1d(padded, kernel, stride=128)
        power = transformed[:, :129] ** 2 + transformed[:, 129:] ** 2
        parts.append(power.sqrt().unflatten(0, chunks.shape[:2]))
    return torch.cat(parts)
