version: str
cuda: bool

# address, dtype, elements from row to row
_Rows = tuple[int, int, int]

def isas() -> list[str]: ...
def nt_xent_workspace(isa: str, dtype: int, N: int, D: int, grad: bool) -> int: ...
def nt_xent(
    isa: str,
    z0: _Rows,
    z1: _Rows,
    N: int,
    D: int,
    temperature: float,
    threads: int,
    loss: int,
    dz: int,
    workspace: int,
) -> None: ...
def tied_nt_xent_workspace(isa: str, dtype: int, N: int, D: int) -> int: ...
def tied_nt_xent(
    isa: str,
    z: _Rows,
    N: int,
    D: int,
    temperature: float,
    threads: int,
    dz: int,
    workspace: int,
) -> None: ...
def info_nce(
    isa: str,
    anchor: _Rows,
    keys: _Rows,
    N: int,
    M: int,
    D: int,
    temperature: float,
    symmetric: bool,
    threads: int,
    loss: int,
    danchor: int,
    dkeys: int,
    workspace: int,
) -> int: ...
def uel_workspace(isa: str, dtype: int, N: int, D: int, threads: int, grad: bool) -> int: ...
def uel(
    isa: str,
    z0: _Rows,
    z1: _Rows,
    N: int,
    D: int,
    temperature: float,
    threads: int,
    loss: int,
    dz: int,
    workspace: int,
) -> None: ...
def topk_similarity(
    isa: str,
    anchor: _Rows,
    keys: _Rows,
    exclude: int,
    N: int,
    M: int,
    D: int,
    E: int,
    k: int,
    threads: int,
    values: int,
    indices: int,
    workspace: int,
) -> int: ...
def nt_xent_cuda_workspace(N: int, D: int, grad: bool) -> int: ...
def nt_xent_cuda(
    z0: int,
    z1: int,
    dtype: int,
    row_stride0: int,
    column_stride0: int,
    row_stride1: int,
    column_stride1: int,
    N: int,
    D: int,
    temperature: float,
    loss: int,
    dz: int,
    workspace: int,
    stream: int,
) -> None: ...
def augment(
    isa: str,
    images: int,
    strides: int,
    offsets: int,
    sizes: int,
    params: int,
    rows: int,
    N: int,
    size: int,
    bicubic: bool,
    norm: int,
    dtype: int,
    channels_last: bool,
    threads: int,
    out: int,
    workspace: int,
) -> int: ...
def linf_step_cpu(
    isa: str,
    x: int,
    grad: int,
    x0: int,
    out: int,
    x_dtype: int,
    grad_dtype: int,
    size: int,
    bounds: int,
    channels: int,
    channel_stride: int,
    threads: int,
) -> None: ...
def linf_step_cuda(
    x: int,
    grad: int,
    x0: int,
    out: int,
    x_dtype: int,
    grad_dtype: int,
    size: int,
    bounds: int,
    channels: int,
    channel_stride: int,
    layout: int,
    bounds_on_device: bool,
    stream: int,
) -> None: ...
def stem_step_cuda(
    dy: int,
    weight: int,
    x: int,
    out: int,
    dy_dtype: int,
    weight_dtype: int,
    x_dtype: int,
    N: int,
    C: int,
    H: int,
    W: int,
    size: int,
    strides: int,
    bounds: int,
    bounds_on_device: bool,
    stream: int,
) -> None: ...
