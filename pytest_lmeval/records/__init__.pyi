"""What is public of the records, and where it lies."""

from ._certificate import Certificate as Certificate, Counterexample as Counterexample, LawResult as LawResult
from ._document import RunDocument as RunDocument, dump as dump, load as load
from ._schema import json_schema as json_schema
