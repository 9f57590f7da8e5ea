"""Methods that leave out steps: TeaCache, MagCache, EasyCache, each beside the settings that its node emits."""
