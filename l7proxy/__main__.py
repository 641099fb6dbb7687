"""``python -m l7proxy``"""

import sys

from l7proxy.main import main

sys.exit(main())
