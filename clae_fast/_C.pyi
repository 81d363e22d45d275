# `_native.run` calls ops by name. csrc/bindings.cpp lists the arguments of each, and
# csrc/<op>.h says what they mean.
version: str
cuda: bool

def isas() -> list[str]: ...
