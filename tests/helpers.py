"Small runs that several test files share."
import os, re, signal, sys, traceback
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np, pytest, torch
from torch import nn
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy

from ssl_notes.augment import weak_augment
from ssl_notes.data import get_dls, get_digits
from ssl_notes.mixmatch import mixmatch_adam

torch.set_num_threads(1)

def short(o): return re.sub(' at 0x[0-9a-f]+', '', str(o))   # names of tests are the same in all processes
DIGITS = get_digits()
gloo = pytest.mark.skipif(not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason='torch without gloo')
linux = pytest.mark.skipif(not sys.platform.startswith('linux'), reason='forks a process that runs torch: Linux only')

def digits_dls(bs=8, steps=4, seed=0, n=40, **kw):
    "Forty labels, forty images for validation: a fit of an epoch takes a tenth of a second."
    kw = {**dict(augment=weak_augment('digits'), valid=40, include_labeled=False, device='cpu'), **kw}
    return get_dls(DIGITS, n, seed=seed, bs=bs, steps=steps, **kw)

def tiny_net(c=10, channels=1, dropout=0.):
    return nn.Sequential(nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(dropout),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, c))

def learner(cbs=(), dls=None, model=None, seed=0, **kw):
    "A network (`model` makes it, after seeding) on digits; every global generator is seeded."
    import random
    random.seed(seed); np.random.seed(seed); torch.manual_seed(seed)
    kw = {**dict(loss_func=CrossEntropyLossFlat(), metrics=accuracy, opt_func=mixmatch_adam), **kw}
    dls = digits_dls(seed=seed) if dls is None else dls
    return Learner(dls, (model or tiny_net)(), cbs=cbs, **kw)

def quiet_fit(learn, *args, how='fit', **kw):
    with learn.no_bar(), learn.no_logging(): getattr(learn, how)(*args, **kw)
    return learn

def weights(learn_or_model):
    m = getattr(learn_or_model, 'model', learn_or_model)
    return {k: v.clone() for k,v in m.state_dict().items()}

def differences(a, b, at='', skip=()):
    "Where two nests of dicts, lists, tensors and numbers differ, bit for bit; `skip` names keys that may."
    if isinstance(a, dict):
        if not isinstance(b, dict) or a.keys() != b.keys(): return [f'{at}: other keys']
        return [d for k in a if k not in skip for d in differences(a[k], b[k], f'{at}/{k}', skip)]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b): return [f'{at}: lengths {len(a)}, {len(b)}']
        return [d for i,(x,y) in enumerate(zip(a, b)) for d in differences(x, y, f'{at}/{i}', skip)]
    if isinstance(a, torch.Tensor):
        alike = isinstance(b, torch.Tensor) and (a.dtype, a.shape) == (b.dtype, b.shape)
        alike = alike and bool(((a == b) | (a != a) & (b != b)).all())
        return [] if alike else [f'{at}: tensors differ']
    return [] if a == b or (a != a and b != b) else [f'{at}: {a!r}, {b!r}']   # nan is like nan

def seeded(s=0): return torch.Generator().manual_seed(s)

def images(b=6, c=3, h=12, w=10, seed=0, kind='noise'):
    "Bytes (b,c,h,w) that are easy to get wrong: few values, two, one."
    x = torch.randint(256, (b, c, h, w), dtype=torch.uint8, generator=seeded(seed))
    if kind == 'narrow': x = x//5 + 70
    if kind == 'few': x = x//64 * 50
    if kind == 'two': x = (x > 200).byte() * 255
    if kind == 'flat': x = x[..., :1, :1].expand(-1, -1, h, w).clone()
    if kind == 'ramp': x = (torch.arange(h*w).view(h, w) % 256 + 0*x.int()).byte()
    return x

class Items:
    "Float images with labels: what a fastai loader of a user's own may give."
    def __init__(self, n=40, c=10, shape=(1, 8, 8), dtype=torch.float32, seed=0):
        self.x = torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
        self.y = torch.arange(n) % c
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i], self.y[i]

def loader(items, bs=8, shuffle=True): return TfmdDL(items, bs=bs, shuffle=shuffle, drop_last=shuffle, num_workers=0)

def own_dls(train=None, bs=8, c=10, **kw):
    "Loaders that fastai made, an unlabelled one among them; `kw` of `Items`."
    dls = DataLoaders(loader(train or Items(**kw), bs), loader(Items(16, **kw), 8, False))
    dls.c, dls.unlabeled = c, loader(Items(seed=1, **kw))
    return dls

def parameters(learn): return {k: v for k,v in weights(learn).items() if 'running' not in k and 'num_batches' not in k}

def refused(learn, *words, error=ValueError):
    "No step is made, and the message has all `words`."
    w = parameters(learn)
    with pytest.raises(error) as e: quiet_fit(learn, 1, 1e-2)
    for o in words: assert o in str(e.value), f'{o!r} not in {e.value}'
    assert differences(w, parameters(learn)) == []

def finite(learn):
    "All columns of the last row say something, but for the one that needs hidden labels."
    names = learn.recorder.metric_names[1:-1]
    return all(np.isfinite(v) for k,v in zip(names, learn.recorder.values[-1]) if k != 'right_rate')

def content(folder):
    "All files with their bytes and times of change."
    return {str(f.relative_to(folder)): (f.read_bytes(), f.stat().st_mtime_ns)
            for f in sorted(Path(folder).rglob('*')) if f.is_file()}

def in_child(f):
    "Run `f` in a forked process; the signal that ended it, 0 if it returned."
    pid = os.fork()
    if not pid:
        code = 1
        try: f(); code = 0
        except BaseException: traceback.print_exc()
        finally: os._exit(code)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or not os.WEXITSTATUS(status), 'the child raised'
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0

def die(): os.kill(os.getpid(), signal.SIGKILL)

class Every(Callback):
    "Calls `f(self)` at `event`, after all other callbacks."
    order = 99
    def __init__(self, event, f, valid=False):
        self.run_valid = valid
        setattr(self, event, lambda: f(self))

def two_processes(f, folder):
    "`f(rank)` in two forked processes of one group; what it returns, by rank."
    import torch.distributed as dist
    def child(rank):
        os.environ['GLOO_SOCKET_IFNAME'] = 'lo'
        store = dist.FileStore(str(folder/'store'), 2)
        dist.init_process_group('gloo', store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
        try: torch.save(f(rank), folder/f'{rank}.pt')
        finally: dist.destroy_process_group()
    with ThreadPoolExecutor(2) as pool: ends = list(pool.map(lambda r: in_child(partial(child, r)), range(2)))
    assert ends == [0, 0]
    return [torch.load(folder/f'{r}.pt') for r in range(2)]
