"""The forms of a whole LRU layer that lru_layer.py measures.

They share their parameters and differ between the two products: pairs in the dtype of the model, complex64, or a
convolution by Fourier transforms.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from fastwkv import linear_scan
from fastwkv.nn import LRU


class Complex64LRU(LRU):
    """B u and h as complex64, whatever the dtype of the model."""

    def forward(self, u: Tensor) -> Tensor:
        """Run over whole sequences, from an empty state."""
        x = F.linear(u, self._into(u.dtype, torch.float32)).unflatten(-1, (-1, 2))
        h = linear_scan(self._decay(torch.float32), torch.view_as_complex(x.float()))
        y = F.linear(torch.view_as_real(h).flatten(-2).to(u.dtype), self._out(u.dtype))
        return torch.addcmul(y, self.D, u)


class FFTLRU(LRU):
    """The recurrence as a convolution of B u with λ^t along time, in complex64; PyTorch only.

    Time is the last axis from one product to the other, as the transforms want it, and padded with as many zeros, so
    that what is added at the end does not come round to the beginning. λ^t is computed in float64: in float32 the phase
    of a late token would have lost its digits.
    """

    def forward(self, u: Tensor) -> Tensor:
        """Run over whole sequences, from an empty state."""
        batch, length = u.shape[:2]
        size = 2 * length
        into = torch.cat((self.B_re, self.B_im)).float() * self.gamma_log.float().exp().repeat(2)[:, None]
        re, im = torch.bmm(into.to(u.dtype).expand(batch, -1, -1), u.mT).float().chunk(2, 1)
        x = torch.fft.fft(torch.complex(re, im), size)
        h = torch.fft.ifft(x * torch.fft.fft(self._powers(length), size))[..., :length]
        out = torch.cat((self.C_re, -self.C_im), 1)
        y = torch.bmm(out.expand(batch, -1, -1), torch.cat((h.real, h.imag), 1).to(u.dtype))
        return torch.addcmul(y.mT, self.D, u)

    def _powers(self, length: int) -> Tensor:
        """Return λ^t, ``[N, T]``."""
        t = torch.arange(length, dtype=torch.float64, device=self.D.device)
        decay, phase = (log.double().exp()[:, None] * t for log in (self.nu_log, self.theta_log))
        return torch.polar(torch.exp(-decay), phase).to(torch.complex64)


FORMS: dict[str, type[LRU]] = {"fastwkv": LRU, "complex64": Complex64LRU, "fft": FFTLRU}
ABOUT = {
    "fastwkv": "fastwkv.nn.LRU: B u and h as pairs of the dtype of the model",
    "complex64": "the same with B u and h as complex64, scanned by fastwkv.linear_scan",
    "fft": "B u convolved with λ^t in complex64 by torch.fft, padded to 2 T, between the same products",
}
