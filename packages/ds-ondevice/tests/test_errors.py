import pickle

from ds_ondevice import MaterializeError, MetaValueError, ReplayError, UnrestorableError


def test_unrestorable_error_survives_pickling():
    error = UnrestorableError({"a.weight": "because"}, "Do this.")
    again = pickle.loads(pickle.dumps(error))
    assert again.reasons == {"a.weight": "because"}
    assert str(again) == str(error)
    assert str(error).endswith("  a.weight: because\nDo this.")


def test_hierarchy():
    assert issubclass(UnrestorableError, MaterializeError)
    assert issubclass(ReplayError, MaterializeError)
    assert issubclass(MaterializeError, RuntimeError)
    assert issubclass(MetaValueError, RuntimeError)
