"""OpenVision L/14: 84, 224 and 336 px in one run; arguments: openvision_curriculum.py."""

import functools

from apps.configs import openvision_curriculum

get_config = functools.partial(openvision_curriculum.get_config, model="L/14")
