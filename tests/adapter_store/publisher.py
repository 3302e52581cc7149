"""A process of its own that publishes: publisher.py STORE USER PEFT_FOLDER COUNT, one line per acknowledged version."""

import sys

from adapter_store import AdapterStore, Limits

place, user_id, folder, count = sys.argv[1:]
store = AdapterStore(place, limits=Limits(live_versions=1000))  # none is dropped, so that a lost one is seen
for number in range(int(count)):
    version = store.publish(user_id, folder, base={"weights": "w"}, metadata={"number": number})
    print(version.version, flush=True)
