"""Where the starter model's sounds come from: Debian packages, what in them is which object, and their licences.

Packages are Debian 12's. Licences are those of each package's copyright file for the files taken.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Soundfont:
    """A General MIDI sound bank."""

    source: str
    package: str
    path: str  # in the package
    licence: str
    velocities: tuple[int, ...] = (50, 85, 115)


@dataclass(frozen=True)
class Recordings:
    """Sound files of one object in one package."""

    object: str
    source: str
    package: str
    files: tuple[str, ...]  # patterns of paths in the package; of a file that holds many, CONTAINER:MEMBER
    licence: str


SOUNDFONTS = (
    Soundfont("fluidr3", "fluid-soundfont-gm", "usr/share/sounds/sf2/FluidR3_GM.sf2", "MIT"),
    Soundfont(
        "musescore", "musescore-general-soundfont", "usr/share/sounds/sf3/MuseScore_General_Full.sf3", "MIT", (40, 100)
    ),
    Soundfont("csoundgm", "csound-soundfont", "usr/share/sounds/sf2/sf_GMbank.sf2", "LGPL-2.1+", (60, 110)),
    Soundfont("freepats", "freepats", "usr/share/midi/freepats", "GPL-2+ with an exception for music", (100,)),
)
# Programs of General MIDI, counted from 0, with the lowest and highest key and the step between keys.
PROGRAMS: dict[str, tuple[tuple[int, int, int, int], ...]] = {
    "accordion": ((21, 48, 88, 3), (23, 50, 86, 5)),
    "acoustic_guitar": ((24, 40, 80, 3), (25, 40, 80, 3)),
    "banjo": ((105, 48, 84, 2),),
    "cello": ((42, 36, 74, 2),),
    "electric_guitar": ((26, 40, 82, 5), (27, 40, 82, 4), (28, 40, 76, 6), (29, 40, 82, 4), (30, 40, 82, 4)),
    "flute": ((73, 60, 93, 2),),
    "french_horn": ((60, 36, 75, 2),),
    "harmonica": ((22, 55, 90, 2),),
    "harp": ((46, 28, 96, 4),),
    "marimba": ((12, 45, 92, 3),),
    "piano": ((0, 24, 100, 5), (1, 26, 98, 6), (2, 28, 96, 8)),
    "saxophone": ((64, 54, 87, 4), (65, 49, 81, 3), (66, 44, 77, 3), (67, 36, 68, 4)),
    "trombone": ((57, 36, 73, 2),),
    "violin": ((40, 55, 98, 2), (110, 55, 88, 4)),
    "offscreen_winds": (
        (68, 58, 90, 3), (69, 52, 80, 4), (70, 35, 72, 4), (71, 50, 90, 3), (75, 60, 90, 6), (79, 60, 90, 6),
    ),
    "offscreen_brass": ((56, 54, 84, 3), (58, 28, 58, 5), (59, 54, 82, 5)),
    "offscreen_ensembles": ((48, 36, 88, 5), (49, 36, 88, 8), (52, 48, 80, 5), (53, 48, 80, 6), (61, 40, 80, 6)),
    "offscreen_keyboards": ((8, 60, 100, 6), (16, 36, 88, 6), (19, 36, 88, 6), (6, 36, 84, 8), (14, 55, 80, 6)),
    "offscreen_synthesizers": (
        (80, 40, 90, 8), (81, 40, 90, 8), (88, 40, 80, 10), (91, 40, 80, 10), (95, 40, 80, 10), (38, 28, 55, 7),
    ),
    "offscreen_others": ((104, 45, 80, 7), (107, 50, 84, 8), (109, 55, 80, 6), (111, 55, 84, 7), (114, 55, 84, 7)),
    "offscreen_effects": ((122, 48, 72, 6), (123, 55, 70, 5), (126, 48, 72, 4), (124, 60, 72, 6), (127, 48, 66, 9)),
}  # fmt: skip
DRUM_KEYS = (35, 36, 37, 38, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 55, 57, 59)
DRUM_KITS = (0, 8, 16, 32, 40)  # of bank 128: standard, room, power, jazz, brush
# Sound effects of fluid-soundfont-gs: (bank, program) of each object; three keys each.
EFFECTS = {
    "dog": ((1, 123),), "car": ((1, 125), (3, 125)), "train": ((6, 125),), "plane": ((7, 125),),
    "offscreen_effects": ((1, 122), (2, 122), (3, 122), (4, 122), (5, 122), (2, 123), (3, 123),
                          (1, 126), (2, 126), (5, 126)),
}  # fmt: skip
EFFECTS_FONT = Soundfont("fluidgs", "fluid-soundfont-gs", "usr/share/sounds/sf2/FluidR3_GS.sf2", "MIT")

_CC3, _GPL2 = "CC-BY-SA-3.0", "GPL-2+"
_WESNOTH = "wesnoth-1.16-data"
_OPENTTD = "openttd-opensfx"
_OPENSFX = "CC-BY-SA-3.0, or as its readme says of a file: CC-BY-3.0, CC0 or public domain"
_BTANKS = "GPL-2+ with an exception for the engine"
RECORDINGS = (
    Recordings("cat", "scratch", "scratch", ("*/Animal/Cat.mp3", "*/Animal/Kitten.wav", "*/Animal/Meow.wav"), _CC3),
    Recordings("dog", "scratch", "scratch", ("*/Animal/Dog?.wav", "*/Animal/WolfHowl.wav"), _CC3),
    Recordings("dog", "lugaru", "lugaru-data", ("*/Bark*.ogg", "*/Growl*.ogg", "*/Snarl*.ogg"), _CC3),
    Recordings("dog", "tuxpaint", "tuxpaint-stamps-default", ("*/dogs/dog.ogg",), "GPL-2"),
    Recordings("dog", "wesnoth", _WESNOTH, ("*/wolf-growl-*.ogg", "*/wolf-hit-*.ogg"), _GPL2),
    Recordings("dog", "widelands", "widelands-data", ("*/animals/wolf_*.ogg", "*/animals/coyote_*.ogg"), _GPL2),
    Recordings("chicken", "scratch", "scratch", ("*/Animal/Rooster.wav",), _CC3),
    Recordings(
        "chicken", "megaglest", "megaglest-data", ("*/chicken/sounds/*.wav", "*/chicken.wav", "*/rooster.ogg"), _CC3
    ),
    Recordings(
        "chicken",
        "pekka",
        "pekka-kana-2-data",
        ("*/doodle.wav", "*/chick.wav", "*/hen.wav", "*/p_doodle.wav"),
        "BSD-2-clause",
    ),
    Recordings("frog", "pekka", "pekka-kana-2-data", ("*/frog_*.wav",), "BSD-2-clause"),
    Recordings("frog", "tuxpaint", "tuxpaint-stamps-default", ("*/amphibians/frog.ogg",), "GPL-2"),
    Recordings("frog", "widelands", "widelands-data", ("*/animals/frog.ogg",), _GPL2),
    Recordings("car", "torcs", "torcs-data", tuple(f"*/torcs/data/sound/{n}.wav" for n in (
        "206_engine", "935", "944", "alpha-romeo", "cleanviper",
        "clkdtmb2", "corolla1400hi2", "engine-1", "evo7_engine*",
        "f360", "ferrari*", "ford*", "gt40", "impreza2002_engine", "lamborghinidiablo", "lotus", "mclarenf1", "nsx",
        "porsche_engine", "renault-v10", "viper*", "xj220")), _GPL2),
    Recordings("car", "btanks", "btanks-data", ("*/engine-car.ogg", "*/engine-[sv]*.ogg"), _BTANKS),
    Recordings("car", "lincity", "lincity-ng-data", ("*/Trafic*.wav",), _GPL2),
    Recordings("car", "micropolis", "micropolis-data", ("*/heavytraffic.wav", "*/honkhonk*.wav", "*/ignition.wav"),
               "GPL-3+"),
    Recordings("car", "opencity", "opencity-data", ("*/wroum.wav",), _GPL2),
    Recordings("car", "scratch", "scratch", ("*/CarPassing.wav",), _CC3),
    Recordings("train", "btanks", "btanks-data", ("*/train.ogg",), _BTANKS),
    Recordings("train", "rili", "ri-li-data", ("*/speed.wav", "*/wagon.wav"), "GPL-2 or GPL-3"),
    Recordings("train", "openttd", _OPENTTD, tuple(f"*/opensfx.cat:{i:02d}" for i in (4, 5, 10, 13, 65, 71)), _OPENSFX),
    Recordings("plane", "openttd", _OPENTTD, tuple(f"*/opensfx.cat:{i:02d}" for i in (8, 9, 59, 61, 69)), _OPENSFX),
    Recordings("plane", "searchandrescue", "searchandrescue-data", ("*/jet_engine_*.wav",), "GPL-2"),
    Recordings("plane", "lincity", "lincity-ng-data", ("*/ParklandPlane*.wav",), _GPL2),
    Recordings("plane", "crrcsim", "crrcsim-data", ("*/electric.wav", "*/fan.wav"), "GPL-2"),
    Recordings("motorcycle", "xmoto", "xmoto-data", ("*/xmoto.bin:engine_*",), _GPL2),
    Recordings("drum", "lmms", "lmms-common", tuple(f"*/samples/drums/{k}*.ogg" for k in (
        "bassdrum", "crash", "hihat", "kick0", "ride", "snare0", "snare_acoustic", "tom")), _GPL2),
    Recordings("drum", "tuxpaint", "tuxpaint-stamps-default", ("*/drum_tomtom_floor.ogg", "*/drumkit.ogg"), "GPL-2"),
    Recordings("electric_guitar", "sectoid", "fretsonfire-songs-sectoid", ("*/guitar.ogg",), "MIT"),
    Recordings("electric_guitar", "muldjord", "fretsonfire-songs-muldjord", ("*/guitar.ogg",), _CC3),
    Recordings("violin", "tuxpaint", "tuxpaint-stamps-default", ("*/string/violin.ogg",), "GPL-2"),
    Recordings("cello", "tuxpaint", "tuxpaint-stamps-default", ("*/string/cello.ogg",), "GPL-2"),
    *(Recordings("drum", f"hydrogen-{kit.split('_')[0].lower()}", "hydrogen-drumkits",
                 tuple(f"*/drumkits/{kit}/{f}" for f in files), licence)
      for kit, files, licence in (
          ("ColomboAcousticDrumkit", ("*.flac",), "GPL-2+ with an exception for music"),
          ("ForzeeStereo", ("C*.wav", "HiHat*.wav", "Kick*.wav", "Ride*.wav", "Snare*.wav", "Tom*.wav"), "GPL-2"),
          ("Millo_MultiLayered*", ("bd*", "cr*", "f*", "h*", "ride*", "rsnare*", "s[dr]*", "t*"), "GPL-2"))),
    *(Recordings("offscreen_speech", f"asterisk-{lang}", f"asterisk-core-sounds-{lang}-wav", ("*/sounds/*/*.wav",), cc)
      for lang, cc in (("en", _CC3), ("fr", _CC3), ("es", _CC3), ("it", "CC-BY-3.0"), ("ru", "CC-BY-3.0"))),
    Recordings("offscreen_speech", "tuxpaint", "tuxpaint-stamps-default", ("*_desc*.ogg",), "GPL-2"),
    Recordings("offscreen_people", "scratch", "scratch", ("*/Human/*", "*/Vocals/*"), _CC3),
    Recordings("offscreen_animals", "scratch", "scratch", (
        "*/Animal/Bird.wav", "*/Animal/Cricket*.wav", "*/Animal/Duck.wav", "*/Animal/Goose.wav", "*/Animal/Horse*.wav",
        "*/Animal/Owl.wav", "*/Animal/SeaLion.mp3"), _CC3),
    Recordings("offscreen_animals", "tuxpaint", "tuxpaint-stamps-default", (
        "*/bovines/*[a-z].ogg", "*/equines/*[a-z].ogg", "*/insects/*[a-z].ogg", "*/birds/[cdlosv]*[a-z].ogg"), "GPL-2"),
    Recordings("offscreen_things", "scratch", "scratch", ("*/Sounds/Effects/[B-LP-Z]*", "*/Electronic/*"), _CC3),
    Recordings("offscreen_things", "tuxpaint", "tuxpaint-stamps-default", ("*/household/*[a-z].ogg",), "GPL-2"),
)  # fmt: skip
NOT_TAKEN = ("*CarPassing*", "*MotorcyclePassing*", "*_desc*")  # unless a pattern names it


def packages() -> list[str]:
    """Return the packages that are needed."""
    fonts = (*SOUNDFONTS, EFFECTS_FONT)
    return list(dict.fromkeys([f.package for f in fonts] + [r.package for r in RECORDINGS]))
