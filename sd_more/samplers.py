"""More samplers, "euler-a", "dpm++", "lms", "lcm": importing this adds their rows to sd.SAMPLERS.

Like those of sd.py they are generators, walk(denoise, x, timesteps, schedule, draw), that yield x
once for each timestep. Those marked in_sigmas compute in the coordinates of sd.py's section 11.
"""

import itertools
import math

import numpy as np

from sd import SAMPLERS, SPACINGS, Sampler, expect, in_sigmas


@in_sigmas
def sample_euler_ancestral(ask, y, sigmas, draw):
    """Euler's method, but go down further than asked and come back with new noise, so that the
    variances add up. That covers old errors, and no longer follows the one equation: more steps
    give another picture. (Crowson's, in k-diffusion)
    """
    for i, (now, then) in enumerate(itertools.pairwise(sigmas)):
        x0, eps = ask(y, i)
        up = then * math.sqrt(max(0, 1 - (then / now) ** 2))
        y = x0 + math.sqrt(then**2 - up**2) * eps + up * draw()
        yield y


@in_sigmas
def sample_dpm_2m(ask, y, sigmas, draw):
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095): follow x0 instead of eps.

    Near the end x0 hardly changes, while eps does, and with strong guidance high orders in eps
    become unstable. For a constant x0, y's distance to it shrinks by then / now. So take x0 in the
    middle of the coming step, by a straight line through the last two over log sigma; r is the last
    step's length over this one's.
    """
    old = None
    for i, (now, then) in enumerate(itertools.pairwise(sigmas)):
        x0, _ = ask(y, i)
        toward = x0
        if old is not None and then > 0:
            r = math.log(sigmas[i - 1] / now) / math.log(now / then)
            toward = x0 + (x0 - old) / (2 * r)
        y, old = toward + then / now * (y - toward), x0
        yield y


def karras_spacing(schedule, steps):
    """Sigmas evenly spaced in their 7th root (Karras et al. 2022, arXiv 2206.00364, eq. 5), smaller
    steps near the end -> the t that have them, which the UNet is told as they are, as in
    k-diffusion; diffusers rounds them.
    """
    log_sigmas = np.minimum(schedule.log_sigmas, math.log(4096))  # as in in_sigmas
    high, low = (math.exp(log_sigmas[t] / 7) for t in (-1, 0))
    sigmas = [(high + (low - high) * i / max(1, steps - 1)) ** 7 for i in range(steps)]
    return [float(np.interp(math.log(s), log_sigmas, range(len(log_sigmas)))) for s in sigmas]


@in_sigmas
def sample_lms(ask, y, sigmas, draw):
    """PLMS's idea with the true distances of up to four sigmas: the integral, over the coming step,
    of the polynomial through the known eps. (Crowson's, in k-diffusion)

    The polynomial is a sum over the known eps, each times a polynomial that is 1 at its own sigma
    and 0 at the others' (Lagrange's). So each eps has that polynomial's integral for its weight.
    """
    old = []  # newest first
    for i, (now, then) in enumerate(itertools.pairwise(sigmas)):
        old = [ask(y, i)[1], *old][:4]
        known = sigmas[i - len(old) + 1 : i + 1][::-1]  # where they were asked
        for own, eps in zip(known, old):
            others = [sigma for sigma in known if sigma != own]
            integral = np.poly1d(others, r=True).integ()  # r: the numbers are its roots
            weight = (integral(then) - integral(now)) / math.prod(own - sigma for sigma in others)
            y = y + float(weight) * eps
        yield y


def sample_lcm(denoise, x, timesteps, schedule, draw):
    """For models distilled to say x0 at once, mostly by an LCM-LoRA (Luo et al. 2023, arXiv
    2311.05556), in 4 to 8 steps at a cfg of 1 to 2: believe x0, and add new noise for the next t.

    They were trained with c_skip x + c_out x0 for the answer, so that at t = 0 it would be x. At
    these t that is x0 but for millionths; it is kept to agree with other programs.
    """
    for t, t_next in itertools.pairwise([*timesteps, None]):
        x0, _ = denoise(x, t)
        time, data = 10 * t, 0.5  # the numbers of that training
        x = time / math.hypot(time, data) * x0 + data**2 / (time**2 + data**2) * x
        x = x if t_next is None else schedule.add_noise(x, draw(), t_next)
        yield x


def lcm_spacing(schedule, steps):
    """Of the 50 timesteps 999, 979 ... 19 that such models were distilled at, as many, evenly."""
    expect(steps <= 50, "steps", steps, "at most 50 with lcm; 4 to 8 are usual")
    return [999 - 20 * int(50 * i / steps) for i in range(steps)]


SPACINGS |= {"karras": karras_spacing, "lcm": lcm_spacing}
SAMPLERS |= {
    "euler-a": Sampler(sample_euler_ancestral, "linspace"),
    "dpm++": Sampler(sample_dpm_2m, "linspace"),
    "dpm++-karras": Sampler(sample_dpm_2m, "karras"),
    "lms": Sampler(sample_lms, "linspace"),
    "lcm": Sampler(sample_lcm, "lcm"),
}
