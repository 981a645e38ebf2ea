"""The network, from top to bottom.

A network takes log-mel spectrograms as they are stored, in dB, and gives logits: `network(features)` is all there is,
in training, testing and prediction. A new network is a class here and a name in MODELS.
"""

import hashlib

import torch
from torch import nn
from torch.nn.functional import avg_pool2d

import utils
from utils import UserError

VIEW_FRAMES = 4  # frames of 23 ms that a view has the mean of: neighbours share most of their 93 ms of sound
EVALUATION_BATCH = 64  # clips in one forward pass outside training

# --- The network -------------------------------------------------------------------------------------------------


class ConvBlock(nn.Sequential):
    """Conv2d 3x3 -> BatchNorm2d -> MaxPool2d -> ReLU -> Dropout: (B, C_in, H, W) -> (B, C_out, H / pool, W / pool).

    ReLU after pooling gives the same function as before it, for a fraction of its work.
    """

    is_fast = False  # in training on a CPU, kernels.py computes the same in less time; see config.FAST_BLOCKS

    def __init__(self, channels_in, channels_out, pool, dropout):
        super().__init__(
            nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1),
            nn.BatchNorm2d(channels_out),
            nn.MaxPool2d(pool),
            nn.ReLU(),
            nn.Dropout(dropout),
        )

    def forward(self, x):
        if self.is_fast and self.training and x.device.type == "cpu":
            import kernels  # imports numba, which nothing else waits for

            if kernels.fits(self, x):
                return kernels.fast_block(self, x)
        return super().forward(x)


class Network(nn.Module):
    """What every network has: normalisation by the training clips' mel bands, and one view unless it says otherwise."""

    def __init__(self, n_mels):
        super().__init__()
        self.register_buffer("band_mean", torch.zeros(n_mels))  # dB
        self.register_buffer("band_std", torch.ones(n_mels))  # dB

    def normalise(self, features):
        """Features (B, n_mels, frames) in dB -> the same in standard deviations of their mel band, (B, 1, ...)."""
        x = (features - self.band_mean[:, None]) / self.band_std[:, None]
        return x.unsqueeze(1).contiguous(memory_format=torch.channels_last)  # (B, 1, n_mels, frames)

    def view_logits(self, features):
        """Features (B, n_mels, frames) in dB -> the logits of each view, (B, views, n_classes), for the loss."""
        return self(features).unsqueeze(1)

    def embed(self, features):
        """Features (B, n_mels, frames) in dB -> what they are like, (B, size): here the logits."""
        return self(features)


class AudioCNN(Network):
    """Three convolution blocks, a mean over time, one convolution over mel bands, two linear layers.

    250,250 parameters for 128 mel bands and 10 classes. Any number of frames from 16 on: the mean over time makes the
    rest of the network independent of it.
    """

    pools = (2, 2), (2, 2), (2, 4)  # mel bands and frames of each block's windows

    def __init__(self, n_classes, n_mels, block_dropout, head_dropout):
        super().__init__(n_mels)
        self.block1 = ConvBlock(1, 32, self.pools[0], block_dropout)
        self.block2 = ConvBlock(32, 64, self.pools[1], block_dropout)
        self.block3 = ConvBlock(64, 128, self.pools[2], block_dropout)
        self.over_bands = nn.Conv1d(128, 64, kernel_size=3, padding=1)
        self.hidden = nn.Linear(64 * (n_mels // 8), 128)
        self.dropout = nn.Dropout(head_dropout)
        self.logits = nn.Linear(128, n_classes)

    def forward(self, features):
        """Features (B, n_mels, frames) in dB -> logits (B, n_classes)."""
        return self.layers(self.normalise(features))

    def embed(self, features):
        """Features (B, n_mels, frames) in dB -> what the last hidden layer says, (B, 128)."""
        return self.hidden_values(self.normalise(features))

    def layers(self, x):
        """(B, 1, n_mels, frames), normalised -> logits (B, n_classes)."""
        return self.logits(self.dropout(self.hidden_values(x)))

    def hidden_values(self, x):
        """(B, 1, n_mels, frames), normalised -> (B, 128)."""
        x = self.block1(x)  # (B, 32, n_mels / 2, frames / 2)
        x = self.block2(x)  # (B, 64, n_mels / 4, frames / 4)
        x = self.block3(x)  # (B, 128, n_mels / 8, frames / 16)
        x = x.mean(dim=3)  # (B, 128, n_mels / 8)
        x = torch.relu(self.over_bands(x))  # (B, 64, n_mels / 8)
        return torch.relu(self.hidden(x.flatten(1)))  # (B, 128)


class SharedAudioCNN(AudioCNN):
    """AudioCNN on four views of a clip; the answer is the mean of their logits.

    The views are means of VIEW_FRAMES frames: as they are, less each band's mean over time, less each frame's mean over
    the bands, less both. In training each view is an example of its own, so that a clip is learnt without the colour of
    its microphone, too, and without its level. The same 250,250 parameters. Any number of frames from 32 on.
    """

    pools = (2, 2), (2, 2), (2, 2)  # a clip's 43 means leave 5 columns; windows of 4 at last would leave 2, for 3 s

    def forward(self, features):
        """Features (B, n_mels, frames) in dB -> logits (B, n_classes)."""
        return self.view_logits(features).mean(dim=1)

    def view_logits(self, features):
        """Features (B, n_mels, frames) in dB -> the logits of each view, (B, 4, n_classes)."""
        logits = self.layers(self.views(features))  # (4 B, n_classes)
        return logits.unflatten(0, (4, -1)).transpose(0, 1)  # (B, 4, n_classes)

    def embed(self, features):
        """Features (B, n_mels, frames) in dB -> what the last hidden layer says, the mean over views, (B, 128)."""
        return self.hidden_values(self.views(features)).unflatten(0, (4, -1)).mean(dim=0)

    def views(self, features):
        """Features (B, n_mels, frames) in dB -> their views, one after the other, (4 B, 1, n_mels, frames / 4)."""
        x = avg_pool2d(self.normalise(features), (1, VIEW_FRAMES))  # (B, 1, n_mels, frames / 4)
        change = x - x.mean(dim=3, keepdim=True)
        return torch.cat([x, change, x - x.mean(dim=2, keepdim=True), change - change.mean(dim=2, keepdim=True)])


MODELS = {"SharedAudioCNN": SharedAudioCNN, "AudioCNN": AudioCNN}


def build_model(settings, n_classes, audio):
    """Return a new network for clips of AudioSettings. UserError if there is none, or its pooling leaves nothing.

    settings: dict with model (a name in MODELS), block_dropout, head_dropout and fast_blocks.
    """
    if settings["model"] not in MODELS:
        raise UserError(f"no model {settings['model']!r} in model.py: MODEL in config.py is one of {', '.join(MODELS)}")
    network = MODELS[settings["model"]](n_classes, audio.n_mels, settings["block_dropout"], settings["head_dropout"])
    for module in network.modules():
        if isinstance(module, ConvBlock):
            module.is_fast = settings["fast_blocks"]
    check_shape(network, audio.shape)
    return network.to(memory_format=torch.channels_last)


def digest(network):
    """Return a short hash of a network's layers, and of its weights' names and shapes: it tells an edit of a layer."""
    shapes = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    return hashlib.blake2b(f"{network} {shapes}".encode(), digest_size=4).hexdigest()


@torch.inference_mode()
def check_shape(network, shape):
    """Raise a UserError if a network can't compute clips of (n_mels, frames): its pooling leaves nothing of them."""
    was_training = network.training
    try:
        network.eval()(torch.zeros(1, *shape, device=network.band_mean.device))
    except RuntimeError as error:
        raise UserError(
            f"{type(network).__name__} can't take {shape[0]} mel bands, {shape[1]} frames ({utils.one_line(error)}): "
            "raise N_MELS, CLIP_SECONDS or CROP_FRAMES in config.py, or choose another MODEL"
        ) from error
    finally:
        network.train(was_training)


@torch.inference_mode()
def logits_of(network, features, precision="float32"):
    """Return the logits of whole clips, (clips, n_classes) float32 on the CPU; the network is left in evaluation mode.

    features: (clips, n_mels, n_frames) in dB, an array or a tensor on any device.
    """
    network.eval()
    device, logits = network.band_mean.device, None
    for start in range(0, len(features), EVALUATION_BATCH):
        batch = slice(start, start + EVALUATION_BATCH)
        with utils.autocast(device, precision):
            output = network(torch.as_tensor(features[batch]).to(device).float())  # (B, n_classes)
        if logits is None:  # one tensor: small ones that stay between large ones that go would spread over the memory
            logits = torch.empty(len(features), output.shape[1])
        logits[batch] = output
    return logits
