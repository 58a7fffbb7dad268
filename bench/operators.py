"""The operators that ops.py and accuracy.py know, by the name that --ops takes and rows carry."""

from operator_base import Operator
from scan_operator import FixedScan, LinearScan
from wkv_operator import WKV

OPERATORS: dict[str, Operator] = {one.name: one for one in (WKV(), LinearScan(), FixedScan())}
