"""A batch that no memory could hold, of which interpreted kernels see the last rows."""

import numpy as np
import pytest
import torch


class FarRows:
    """Context in which interpreted kernels work on the last B rows of a batch that no memory could hold.

    Programs are numbered as those of the last rows are, and tensors begin as far before what there is of them.
    """

    def __init__(self, B: int, rows: int) -> None:
        self.B, self.rows = B, rows

    def __enter__(self) -> None:
        from triton.runtime import interpreter

        from fastwkv.kernels import linear_scan_bwd

        builder, convert = interpreter.interpreter_builder, interpreter._implicit_cvt
        number, sums = builder.set_grid_idx, linear_scan_bwd.row_sums
        self.patch = pytest.MonkeyPatch()

        def convert_far(argument):
            result = convert(argument)
            for axis, size in enumerate(argument.shape if isinstance(argument, torch.Tensor) else ()):
                if size % self.B == 0:  # sequences, or chunks of all of them
                    skipped = size // self.B * self.rows * argument.stride(axis) * argument.itemsize
                    result.handle.data = result.handle.data - np.uint64(skipped)
            return result

        def number_far(x, y, z):
            builder.grid_idx = x + builder.grid_dim[0] // self.B * self.rows, y, z

        def sums_near(*arguments):  # whose programs are numbered by channels
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(interpreter, "_implicit_cvt", convert)
                patch.setattr(builder, "set_grid_idx", number)
                sums(*arguments)

        self.patch.setattr(interpreter, "_implicit_cvt", convert_far)
        self.patch.setattr(builder, "set_grid_idx", number_far)
        self.patch.setattr(linear_scan_bwd, "row_sums", sums_near)

    def __exit__(self, *_: object) -> None:
        self.patch.undo()
