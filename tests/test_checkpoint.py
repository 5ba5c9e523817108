"Killed at any moment and resumed, a run ends bit for bit where the uninterrupted one ends."
import errno, io, json, os, pickle, pickletools, random, signal, subprocess, sys, time, zipfile
from functools import partial
from pathlib import Path

import fastprogress.fastprogress, fastai.callback.schedule # fit_one_cycle
import numpy as np, pytest, torch
from torch import nn
from fastai.callback.progress import CSVLogger, ShowGraphCallback
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.core import DataLoaders
from fastai.data.transforms import IndexSplitter
from fastai.optimizer import OptimWrapper, ranger
from fastai.vision.augment import RandomCrop, Resize, aug_transforms
from fastai.vision.core import PILImage
from fastai.vision.data import ImageBlock

from ssl_notes.augment import weak_augment
from ssl_notes.cli import main
from ssl_notes.core import Checkpoint, EMATeacher, read_checkpoint, unlabeled_dl, write_atomically
from ssl_notes.data import ImageDL
from ssl_notes.mixmatch import MixMatchCallback

from helpers import (DIGITS, content, die, differences, digits_dls, Every, in_child, learner, linux, quiet_fit,
                     tiny_net, weights)

EPOCHS, STEPS = 3, 5
mixmatch = partial(MixMatchCallback, rampup=6, ema=.9)


# -- the runs that are killed ---------------------------------------------------------------------
def plain(folder, cbs=(), every=3, keep=2, **kw):
    kw.setdefault('dls', digits_dls(steps=STEPS))
    return learner([mixmatch(), Checkpoint(folder, every=every, keep=keep), *cbs], path=Path(folder).parent, **kw)

def picture(i): return PILImage.create(np.repeat(DIGITS.train.x[i, 0].numpy()[..., None], 3, -1))

def from_datablock(folder, **kw):
    "fastai's own loaders with random item and batch transforms: nothing in them can save its position."
    random.seed(0); torch.manual_seed(0)
    block = DataBlock((ImageBlock, CategoryBlock), get_x=picture, get_y=lambda i: int(DIGITS.train.y[i]),
        splitter=IndexSplitter(range(40, 60)), item_tfms=[Resize(16), RandomCrop(14)], batch_tfms=aug_transforms(size=14))
    dls = block.dataloaders(list(range(60)), bs=8, num_workers=0, device='cpu')
    unl = unlabeled_dl(dls, list(range(100, 160)), num_workers=0)
    return learner([mixmatch(unlabeled=unl), Checkpoint(folder, every=3, keep=2)], dls=dls,
                   model=partial(tiny_net, channels=3, dropout=.3), **kw)

def one_pass(folder):
    "An `ImageDL` that makes one shuffled pass an epoch instead of a stream."
    random.seed(0)
    base = digits_dls()
    train = ImageDL(base.train.dataset, 8, shuffle=True, augment=weak_augment('digits'))
    dls = DataLoaders(train, base.valid)
    dls.c = 10
    return learner([mixmatch(unlabeled=base.unlabeled), Checkpoint(folder, every=3)], dls=dls)

def with_trackers(folder):
    return plain(folder, [SaveModelCallback('accuracy'), EarlyStoppingCallback('valid_loss', patience=9),
                          ReduceLROnPlateau('valid_loss', min_delta=9, patience=1), CSVLogger()])

def train_metrics(folder):
    learn = plain(folder)
    learn.recorder.train_metrics = True
    return learn

def supervised(folder): return learner([EMATeacher(.9), Checkpoint(folder, every=3)], dls=digits_dls(steps=STEPS))

def averaged_buffers(folder):
    return learner([EMATeacher(.9, buffers='average'), mixmatch(), Checkpoint(folder, every=3)], dls=digits_dls(steps=STEPS))

def torch_optim(folder): return plain(folder, opt_func=partial(OptimWrapper, opt=torch.optim.AdamW))

def channels_last(folder): return plain(folder, model=lambda: tiny_net().to(memory_format=torch.channels_last))

RUNS = dict(plain=plain, from_datablock=from_datablock, with_trackers=with_trackers, supervised=supervised,
            torch_optim=torch_optim, channels_last=channels_last, one_pass=one_pass, train_metrics=train_metrics,
            lookahead=lambda f: plain(f, opt_func=ranger),
            averaged_buffers=averaged_buffers,
            accumulated=lambda f: plain(f, [GradientAccumulation(20)]),
            sparse=lambda f: plain(f, every=7, keep=1))
WHOLE = {}

def fit(run, folder, cbs=None, how='fit'): return quiet_fit(RUNS[run](folder), EPOCHS, 2e-3, how=how, cbs=cbs)

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "Final checkpoint of the uninterrupted run, made once for each kind."
    def get(run, how='fit'):
        if (run, how) not in WHOLE:
            learn = fit(run, tmp_path_factory.mktemp(run)/'ck', how=how)
            WHOLE[run, how] = read_checkpoint(learn.checkpoint.files()[-1])
        return WHOLE[run, how]
    return get

def ended_alike(learn, whole):
    files = learn.checkpoint.files()
    assert not [f for f in learn.checkpoint.folder.iterdir() if f not in files], 'left-over files'
    last = read_checkpoint(files[-1])
    assert differences(whole, last) == []
    if not hasattr(learn, 'save_model'): assert differences(whole['model'], weights(learn)) == []
    assert differences(whole['recorder']['values'], [list(v) for v in learn.recorder.values]) == []
    return last

def killer(event, n, valid=False):
    "SIGKILL at the `n`-th `event`, counted from 1."
    count = [0]
    def f(cb):
        count[0] += 1
        if count[0] == n: die()
    return Every(event, f, valid)


# -- killed at some step --------------------------------------------------------------------------
rng = random.Random(7)
EVENTS = ['before_batch', 'after_pred', 'after_loss', 'before_step', 'after_step', 'after_batch']
anywhere = [('plain', rng.choice(EVENTS), n) for n in sorted(rng.sample(range(1, EPOCHS*STEPS+1), 6))]
others = [(r, rng.choice(EVENTS[:3]), rng.randint(5, EPOCHS*STEPS-1)) for r in
          ('from_datablock', 'from_datablock', 'with_trackers', 'with_trackers', 'supervised', 'torch_optim', 'lookahead',
           'channels_last', 'averaged_buffers', 'accumulated', 'accumulated', 'sparse')]

@linux
@pytest.mark.parametrize('run, event, n', anywhere + others)
def test_killed_anywhere(run, event, n, tmp_path, whole):
    expected = whole(run)
    assert in_child(lambda: fit(run, tmp_path/'ck', killer(event, n))) == signal.SIGKILL
    ended_alike(fit(run, tmp_path/'ck'), expected)

@linux
@pytest.mark.parametrize('n', [4, 11])
def test_one_cycle(n, tmp_path, whole):
    expected = whole('plain', 'fit_one_cycle')
    in_child(lambda: fit('plain', tmp_path/'ck', killer('after_loss', n), 'fit_one_cycle'))
    ended_alike(fit('plain', tmp_path/'ck', how='fit_one_cycle'), expected)

@linux
@pytest.mark.parametrize('n', [2, 8])
def test_train_metrics(n, tmp_path, whole):
    "The metrics of the training set are means over the whole epoch, not over what was left of it"
    expected = whole('train_metrics')
    in_child(lambda: fit('train_metrics', tmp_path/'ck', killer('after_loss', n)))
    ended_alike(fit('train_metrics', tmp_path/'ck'), expected)

@linux
def test_one_shuffled_pass(tmp_path, whole):
    expected = whole('one_pass')
    in_child(lambda: fit('one_pass', tmp_path/'ck', killer('after_loss', 8)))
    ended_alike(fit('one_pass', tmp_path/'ck'), expected)

@linux
@pytest.mark.parametrize('event, n', [('before_validate', 2), ('after_validate', 1), ('before_epoch', 3),
                                      ('before_train', 2), ('after_epoch', EPOCHS-1)])
def test_killed_between_epochs(event, n, tmp_path, whole):
    expected = whole('plain')
    in_child(lambda: fit('plain', tmp_path/'ck', killer(event, n, valid=True)))
    ended_alike(fit('plain', tmp_path/'ck'), expected)

@linux
def test_killed_three_times(tmp_path, whole):
    "In a run that was resumed already, counted from where it began again"
    expected = whole('plain')
    for n in (4, 3, 5): assert in_child(lambda: fit('plain', tmp_path/'ck', killer('after_batch', n))) == signal.SIGKILL
    ended_alike(fit('plain', tmp_path/'ck'), expected)

def test_interrupted_cell(tmp_path, whole):
    "Ctrl-C, then the same cell again with the same `Learner`"
    expected = whole('plain')
    def stop(cb):
        if cb.train_iter == 8: raise KeyboardInterrupt
    learn = plain(tmp_path/'ck')
    with pytest.raises(KeyboardInterrupt): quiet_fit(learn, EPOCHS, 2e-3, cbs=Every('after_batch', stop))
    learn.remove_cbs(Every)
    ended_alike(quiet_fit(learn, EPOCHS, 2e-3), expected)

@linux
def test_best_model(tmp_path):
    "`SaveModelCallback` knows after a kill what was best before it, and loads it at the end"
    (tmp_path/'a').mkdir(), (tmp_path/'b').mkdir()
    a = fit('with_trackers', tmp_path/'a/ck')
    in_child(lambda: fit('with_trackers', tmp_path/'b/ck', killer('after_loss', 13)))
    b = fit('with_trackers', tmp_path/'b/ck')
    assert differences(weights(a), weights(b)) == []
    table = lambda f: [l.rsplit(',', 1)[0] for l in (f/'history.csv').read_text().splitlines()]   # without the time
    assert table(tmp_path/'a') == table(tmp_path/'b') and len(table(tmp_path/'a')) == EPOCHS+1

@linux
def test_best_model_of_the_last_epoch(tmp_path):
    "Killed after the last checkpoint and before the trackers have seen the last epoch"
    (tmp_path/'a').mkdir(), (tmp_path/'b').mkdir()
    def last(cb):
        if cb.epoch == EPOCHS-1: die()
    kill = Every('after_epoch', last)
    kill.order = 60   # after `Checkpoint`, before `SaveModelCallback`
    score = dict(monitor='weight', comp=np.greater)   # grows until the ramp is over
    def run(d, cbs=()):
        ck = Checkpoint(tmp_path/d/'ck', every=3)
        l = learner([MixMatchCallback(rampup=1000), ck, SaveModelCallback(**score), *cbs], path=tmp_path/d,
                    dls=digits_dls(steps=STEPS))
        return quiet_fit(l, EPOCHS, 2e-3)
    a = run('a')
    assert in_child(lambda: run('b', [kill])) == signal.SIGKILL
    assert differences(weights(a), weights(run('b'))) == []

@linux
def test_early_stopping(tmp_path):
    "A run that stopped early stops at the same place after a kill"
    def run(d, cbs=None):
        l = plain(tmp_path/d, [EarlyStoppingCallback('accuracy', min_delta=9, patience=1)])
        return quiet_fit(l, 6, 2e-3, cbs=cbs)
    a = run('a')
    in_child(lambda: run('b', killer('after_loss', 7)))
    b = run('b')
    assert len(a.recorder.values) == len(b.recorder.values) == 2
    assert differences(weights(a), weights(b)) == []

@linux
def test_graph_after_resume(tmp_path, monkeypatch):
    "fastai's graph of losses has a point for each epoch of a resumed run too"
    drawn = []
    def draw(mbar, graphs, *bounds): drawn.append([tuple(map(len, g)) for g in graphs])
    monkeypatch.setattr(fastprogress.fastprogress.ConsoleMasterBar, 'update_graph', draw)
    def run(cbs=None):
        l = plain(tmp_path/'ck', [ShowGraphCallback()])
        with l.no_logging(): l.fit(EPOCHS, 2e-3, cbs=cbs)
    in_child(lambda: run(killer('after_loss', 8)))
    run()
    assert drawn and all(x == y for graphs in drawn for x,y in graphs), drawn


# -- killed while writing -------------------------------------------------------------------------
def half(n):
    "The `n`-th file gets half of its bytes"
    real, count = torch.save, [0]
    def save(obj, f, *args, **kw):
        count[0] += 1
        if count[0] < n: return real(obj, f, *args, **kw)
        b = io.BytesIO()
        real(obj, b)
        f.write(b.getvalue()[:len(b.getvalue())//2])
        f.flush()
        die()
    torch.save = save

def at_call(name, n, after=False):
    "Dies at the `n`-th call of `os.NAME`"
    real, count = getattr(os, name), [0]
    def f(*args, **kw):
        count[0] += 1
        if count[0] == n and not after: die()
        res = real(*args, **kw)
        if count[0] == n: die()
        return res
    setattr(os, name, f)

WRITING = dict(half_of_the_first=lambda: half(1), half_of_the_third=lambda: half(3), half_of_the_last=lambda: half(6),
    not_on_disk=lambda: at_call('fsync', 3), before_rename=lambda: at_call('replace', 2),
    before_first_rename=lambda: at_call('replace', 1), after_rename=lambda: at_call('replace', 4, True),
    before_last_rename=lambda: at_call('replace', 6), before_old_is_dropped=lambda: at_call('unlink', 1))

@linux
@pytest.mark.parametrize('how', WRITING)
def test_killed_while_writing(how, tmp_path, whole):
    expected = whole('plain')
    def child():
        WRITING[how]()
        fit('plain', tmp_path/'ck')
    assert in_child(child) == signal.SIGKILL
    for f in (tmp_path/'ck').glob('step_*.pt'): read_checkpoint(f)   # what has its name is whole
    ended_alike(fit('plain', tmp_path/'ck'), expected)

def test_stale_files_go_others_stay(tmp_path):
    (tmp_path/'ck').mkdir()
    stale, mine = tmp_path/'ck/.step_000000003_00000.pt.4711.tmp', tmp_path/'ck/notes.txt'
    stale.write_bytes(b'half'), mine.write_text('mine')
    fit('plain', tmp_path/'ck')
    assert not stale.exists() and mine.read_text() == 'mine'

def test_full_disk(tmp_path, monkeypatch, whole):
    "The error is the system's, the files before stay, and training goes on when there is room again"
    expected, real, count = whole('plain'), torch.save, [0]
    def save(obj, f, *args, **kw):
        count[0] += 1
        if count[0] < 3: return real(obj, f, *args, **kw)
        f.write(b'x'*1000)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(torch, 'save', save)
    with pytest.raises(OSError, match='No space left'): fit('plain', tmp_path/'ck')
    monkeypatch.undo()
    files = sorted((tmp_path/'ck').glob('step_*.pt'))
    assert [read_checkpoint(f)['n_updates'] for f in files] == [3, 6]
    ended_alike(fit('plain', tmp_path/'ck'), expected)

def test_full_disk_keeps_no_half(tmp_path, monkeypatch):
    "Half a file on a full disk would help nobody"
    def save(obj, f, *args, **kw):
        f.write(b'x'*1000)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(torch, 'save', save)
    with pytest.raises(OSError): write_atomically({}, tmp_path/'a.pt')
    assert list(tmp_path.iterdir()) == []

def test_folder_is_a_file(tmp_path):
    (tmp_path/'ck').write_text('precious')
    learn = plain(tmp_path/'ck')
    w = weights(learn)
    with pytest.raises(OSError, match='ck'): quiet_fit(learn, EPOCHS)
    assert (tmp_path/'ck').read_text() == 'precious' and differences(w, weights(learn)) == []

@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='the superuser may write everywhere')
def test_folder_not_writable(tmp_path):
    (tmp_path/'ck').mkdir()
    (tmp_path/'ck').chmod(0o555)
    learn = plain(tmp_path/'ck')
    with pytest.raises(PermissionError, match='ck'): quiet_fit(learn, EPOCHS)
    (tmp_path/'ck').chmod(0o755)


# -- which files there are, and what is in them ---------------------------------------------------
@pytest.mark.parametrize('every, keep, updates', [(4, 3, [8, 12, 15]), (4, 1, [15]), (100, 3, [15]), (5, 2, [15, 15]),
                                                  (1, 20, [*range(1, 16), 15])])
def test_every_and_keep(every, keep, updates, tmp_path):
    learn = quiet_fit(plain(tmp_path, every=every, keep=keep), EPOCHS, 2e-3)
    states = [read_checkpoint(f) for f in learn.checkpoint.files()]
    assert [s['n_updates'] for s in states] == updates
    assert [s['model']['0.weight'].equal(weights(learn)['0.weight']) for s in states][-1]

def test_accumulated_gradients_count_once(tmp_path):
    learn = quiet_fit(plain(tmp_path, [GradientAccumulation(20)], every=1, keep=99), EPOCHS, 2e-3)
    assert learn.checkpoint.n_updates == learn.mix_match.n_step == learn.ema_teacher.n_updates == 5
    assert [read_checkpoint(f)['train_iter'] for f in learn.checkpoint.files()] == [3, 6, 9, 12, 15, 15]

ALLOWED = {'collections OrderedDict', 'torch._utils _rebuild_tensor_v2'} | {
    f'torch {o}Storage' for o in ('Float', 'Double', 'Long', 'Int', 'Byte', 'Bool')}

@pytest.mark.parametrize('run', ['plain', 'from_datablock', 'with_trackers', 'lookahead', 'torch_optim'])
def test_no_code_inside(run, tmp_path):
    "Plain containers, numbers and tensors: there is nothing in the file that loading it could execute"
    learn = fit(run, tmp_path/'ck')
    for f in learn.checkpoint.files():
        torch.load(f, weights_only=True)
        with zipfile.ZipFile(f) as z: data = z.read(next(n for n in z.namelist() if n.endswith('data.pkl')))
        ops = list(pickletools.genops(data))
        assert not [o.name for o,_,_ in ops if o.name in ('STACK_GLOBAL', 'INST', 'OBJ', 'NEWOBJ', 'NEWOBJ_EX', 'EXT1')]
        assert {arg for o,arg,_ in ops if o.name == 'GLOBAL'} <= ALLOWED


# -- files that cannot be resumed from ------------------------------------------------------------
@pytest.fixture(scope='module')
def two_files(tmp_path_factory):
    "A run that stopped in its second epoch: two files, as bytes"
    d = tmp_path_factory.mktemp('cut')/'ck'
    def stop(cb):
        if cb.train_iter == 8: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): fit('plain', d, Every('after_batch', stop))
    return {f.name: f.read_bytes() for f in sorted(d.iterdir())}

def put(files, folder, newest=None):
    folder.mkdir(parents=True)
    for k,v in files.items(): (folder/k).write_bytes(v)
    path = folder/max(files)
    if newest is not None: path.write_bytes(newest)
    return path

def refused(make, path, *words, epochs=EPOCHS, **kw):
    "The error names the file and a remedy; no file and no weight has changed."
    before, learn = content(path.parent), make(path.parent)
    w = weights(learn)
    with pytest.raises(ValueError) as e: quiet_fit(learn, epochs, 2e-3, **kw)
    for o in (str(path), 'choose another folder', *words): assert o in str(e.value), f'{o!r} not in {e.value}'
    assert content(path.parent) == before
    return differences(w, weights(learn))

@pytest.mark.parametrize('share', [0, .001, .3, .7, .95, .9999])
def test_truncated(share, two_files, tmp_path):
    good = two_files[max(two_files)]
    path = put(two_files, tmp_path/'ck', good[:int(len(good)*share)])
    assert refused(plain, path, 'not a whole checkpoint') == []

def test_older_file_serves_after_damage(two_files, tmp_path, whole):
    "The remedy of the message works: without the damaged file, the one before is taken"
    put(two_files, tmp_path/'ck', b'').unlink()
    ended_alike(fit('plain', tmp_path/'ck'), whole('plain'))

def test_flipped_bits(two_files, tmp_path):
    "A flipped bit is noticed, or lies where it changes nothing (as in the time stamp of an entry)"
    good = two_files[max(two_files)]
    path, rng, noticed = put(two_files, tmp_path/'ck'), random.Random(0), 0
    expected = read_checkpoint(path)
    for _ in range(150):
        i, bit = rng.randrange(len(good)), rng.randrange(8)
        path.write_bytes(good[:i] + bytes([good[i] ^ 1 << bit]) + good[i+1:])
        try: assert differences(expected, read_checkpoint(path)) == [], f'byte {i}, bit {bit}'
        except ValueError as e:
            noticed += 1
            assert str(path) in str(e) and 'choose another folder' in str(e)
    assert noticed > 50
    data = good.index(torch.load(io.BytesIO(good), weights_only=True)['model']['0.weight'].numpy().tobytes())
    path.write_bytes(good[:data] + bytes([good[data] ^ 1]) + good[data+1:])
    assert refused(plain, path, 'damaged') == []

class Evil:
    def __reduce__(self): return os.mkdir, ('executed',)

@pytest.mark.parametrize('what', ['noise', 'text', 'zip', 'weights', 'list', 'pickle', 'evil', 'older_format'])
def test_foreign(what, two_files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    def saved(o, **kw):
        b = io.BytesIO()
        torch.save(o, b, **kw)
        return b.getvalue()
    def a_zip():
        b = io.BytesIO()
        with zipfile.ZipFile(b, 'w') as z: z.writestr('a.txt', 'hello')
        return b.getvalue()
    make = dict(noise=lambda: random.Random(0).randbytes(5000), text=lambda: b'{"accuracy": 1}', zip=a_zip,
        weights=lambda: saved(tiny_net().state_dict()), list=lambda: saved([1, 2]),
        pickle=lambda: pickle.dumps(dict(format='ssl_notes-1')), evil=lambda: saved(dict(format='ssl_notes-1', a=Evil())),
        older_format=lambda: saved(dict(format='ssl_notes-0')))
    assert refused(plain, put(two_files, tmp_path/'ck', make[what]())) == []
    assert not (tmp_path/'executed').exists()

OTHER_RUNS = dict(
    wider=(lambda f: plain(f, model=lambda: nn.Sequential(*tiny_net()[:-1], nn.Linear(8, 20), nn.Linear(20, 10))), 'another model'),
    first_layer=(lambda f: plain(f, model=lambda: nn.Sequential(nn.Conv2d(1, 4, 3), *tiny_net()[2:4], nn.AdaptiveAvgPool2d(1),
                                                         nn.Flatten(), nn.Linear(4, 10))), 'another model'),
    no_method=(lambda f: learner([Checkpoint(f)], dls=digits_dls(steps=STEPS)), 'callbacks'),
    more_callbacks=(lambda f: plain(f, [EarlyStoppingCallback()]), 'callbacks'),
    steps=(lambda f: plain(f, dls=digits_dls(steps=7)), 'n_iter=5, this one has n_iter=7'))

@pytest.mark.parametrize('how', OTHER_RUNS)
def test_other_run(how, two_files, tmp_path):
    make, word = OTHER_RUNS[how]
    assert refused(make, put(two_files, tmp_path/'ck'), word) == []

def test_other_last_layer(two_files, tmp_path):
    "Not even the layers that would fit are taken over"
    make = lambda f: plain(f, model=lambda: nn.Sequential(*tiny_net()[:-1], nn.Linear(8, 10, bias=False)))
    assert refused(make, put(two_files, tmp_path/'ck'), 'another model') == []

def test_other_parameter_groups(two_files, tmp_path):
    from fastai.torch_core import params
    make = lambda f: plain(f, splitter=lambda m: [params(m[:2]), params(m[2:])])
    refused(make, put(two_files, tmp_path/'ck'), 'optimiser')

def test_other_number_of_images(two_files, tmp_path):
    path = put(two_files, tmp_path/'ck')
    before, learn = content(path.parent), plain(path.parent, dls=digits_dls(steps=STEPS, n=50))
    with pytest.raises(ValueError, match='images'): quiet_fit(learn, EPOCHS)
    assert content(path.parent) == before

@pytest.mark.parametrize('n', [1, EPOCHS+2])
def test_other_length(n, two_files, tmp_path):
    path = put(two_files, tmp_path/'ck')
    assert refused(plain, path, f'n_epoch={EPOCHS}, this one has n_epoch={n}', epochs=n) == []

def test_no_resume_wanted(two_files, tmp_path):
    path = put(two_files, tmp_path/'ck')
    learn = learner([mixmatch(), Checkpoint(path.parent, resume=False)], dls=digits_dls(steps=STEPS))
    before, w = content(path.parent), weights(learn)
    with pytest.raises(ValueError, match='holds the checkpoints.*choose another folder'): quiet_fit(learn, EPOCHS)
    assert content(path.parent) == before and differences(w, weights(learn)) == []

@pytest.mark.parametrize('kw', [dict(every=0), dict(keep=0), dict(every=-3)])
def test_bad_arguments(kw, tmp_path):
    with pytest.raises(ValueError, match=f'{next(iter(kw))}: got'): Checkpoint(tmp_path, **kw)


# -- what looks at the model leaves checkpoints alone ---------------------------------------------
def test_looking_writes_nothing(tmp_path):
    learn = fit('plain', tmp_path/'ck')
    before, w = content(tmp_path/'ck'), weights(learn)
    with learn.no_bar(), learn.no_logging(): learn.validate(), learn.get_preds(), learn.show_training_loop()
    assert content(tmp_path/'ck') == before and differences(w, weights(learn)) == []
    with pytest.raises(ValueError, match='finished run; choose another folder'): quiet_fit(learn, EPOCHS)
    assert content(tmp_path/'ck') == before

def test_lr_find_first(tmp_path, whole):
    "`lr_find` writes no checkpoint and counts no update"
    learn = plain(tmp_path/'ck')
    with learn.no_bar(): learn.lr_find(num_it=8, show_plot=False)
    assert not list(tmp_path.rglob('step_*.pt'))
    assert learn.checkpoint.n_updates == 0

def test_validation_inside_a_run(tmp_path):
    "A callback that calls `learn.validate()` after each epoch does not throw the run back to the last file"
    calls = []
    def look(cb):
        if calls and calls[-1] == cb.mix_match.n_step: return   # `validate` ends with an `after_epoch` of its own
        calls.append(cb.mix_match.n_step)
        with cb.learn.no_logging(): cb.learn.validate()
    quiet_fit(plain(tmp_path/'ck'), EPOCHS, 2e-3, cbs=Every('after_epoch', look))
    assert calls == [STEPS, 2*STEPS, 3*STEPS]

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('make', [lambda f: plain(f, dls=digits_dls(steps=STEPS, device='cuda'))])
def test_on_gpu(make, tmp_path):
    def stop(cb):
        if cb.train_iter == 8: raise KeyboardInterrupt
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = True
    a = quiet_fit(make(tmp_path/'a'), EPOCHS, 2e-3)
    with pytest.raises(KeyboardInterrupt): quiet_fit(make(tmp_path/'b'), EPOCHS, 2e-3, cbs=Every('after_batch', stop))
    b = quiet_fit(make(tmp_path/'b'), EPOCHS, 2e-3)
    for k,v in weights(a).items(): torch.testing.assert_close(v, weights(b)[k])


# -- the command ----------------------------------------------------------------------------------
ARGS = 'train mixmatch --data digits --labels 40 --steps 48 --evals 4 --bs 8 --every 5 --out'.split()

def result(folder):
    r = json.loads((folder/'result.json').read_text())
    rows = [{k: v for k,v in o.items() if k not in ('cpu_s', 'wall_s')} for o in r['curve']]
    return {**{k: r[k] for k in ('accuracy', 'method', 'labels', 'steps', 'protocol', 'parameters')}, 'curve': rows}

def test_command(tmp_path, capsys):
    "`python -m ssl_notes`, killed twice from outside, against a run in one go"
    assert main([*ARGS, str(tmp_path/'whole')]) == 0
    cmd = [sys.executable, '-W', 'ignore', '-m', 'ssl_notes', *ARGS, str(tmp_path/'cut')]
    for n in (5, 25):
        p = subprocess.Popen(cmd + ['--resume'], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                             env={**os.environ, 'OMP_NUM_THREADS': '1'})
        newest = lambda: max([int(f.name.split('_')[1]) for f in tmp_path.glob('cut/checkpoints/step_*')], default=0)
        while newest() < n and p.poll() is None: time.sleep(.002)
        p.kill()
        p.wait()
        assert not (tmp_path/'cut/result.json').exists(), 'it was too quick to be killed'
    kept = content(tmp_path/'cut')
    capsys.readouterr()
    with pytest.raises(SystemExit, match='holds a run already: --resume goes on with it'): main(cmd[5:])
    assert content(tmp_path/'cut') == kept
    assert main([*cmd[5:], '--resume']) == 0
    assert differences(result(tmp_path/'whole'), result(tmp_path/'cut')) == []
    out = capsys.readouterr().out
    assert str(tmp_path/'cut/result.json') in out and 'mixmatch' in out
    last = [read_checkpoint(max((tmp_path/d/'checkpoints').glob('step_*'))) for d in ('whole', 'cut')]
    assert differences(*last, skip=('curve', 'rng')) == []   # times; the global state of this process and of another
    assert differences(*[o['cbs']['mix_match'] for o in last]) == []

def test_command_after_the_end(tmp_path):
    "Killed between the last checkpoint and the result file: --resume writes the result"
    assert main([*ARGS, str(tmp_path/'a')]) == 0
    expected = result(tmp_path/'a')
    (tmp_path/'a/result.json').unlink()
    assert main([*ARGS, str(tmp_path/'a'), '--resume']) == 0
    assert differences(expected, result(tmp_path/'a')) == []
