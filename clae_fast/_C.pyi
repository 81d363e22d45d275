version: str
cuda: bool

def isas() -> list[str]: ...
def nt_xent_workspace(isa: str, N: int, D: int, grad: bool) -> int: ...
def nt_xent(
    isa: str,
    z0: int,
    z1: int,
    stride0: int,
    stride1: int,
    N: int,
    D: int,
    temperature: float,
    threads: int,
    loss: int,
    dz: int,
    workspace: int,
) -> None: ...
