"""The operators that ops.py and accuracy.py know, by the name that --ops takes and rows carry."""

from peers.linear_scan import FixedScan, LinearScan
from peers.operator import Operator
from peers.wkv import WKV

OPERATORS: dict[str, Operator] = {one.name: one for one in (WKV(), LinearScan(), FixedScan())}
