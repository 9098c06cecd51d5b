"""The contract as test classes, for whoever adds a framework, an operator, a kind of gradient or a store.

Inherit, fill the hooks, and pytest runs the claims. Nothing here knows a framework, or imports pytest:

    class TestMyOperator(OperatorContract):
        def operator(self):
            return MyOperator(...)

        def matrix(self):  # the slow truth, in NumPy
            return ...

| contract | for | hooks |
|---|---|---|
| `BatchContract` | a `types.Batch` | batch, columns |
| `BilinearFormContract` | `types.BilinearForm` | form, form_matrix |
| `OperatorContract` | `types.Operator` | operator, matrix; form_matrix, composition |
| `LinearOperatorContract` | `operators.algebra.LinearOperator` | also gradient_values, block_values, dampings |
| `GradientContract` | `gradients.algebra.Gradient` | value, meaning, partners |
| `GradientProviderContract` | `types.GradientProvider` | provider, batch, slow_grads, slow_mixed_grads |
| `StructuredProviderContract` | `gradients.provider.StructuredGradientProvider` | also slow_curvature, fishers, kinds |
| `BlockMapperContract` | `types.BlockMapper` | mapper, left, right, modes |
| `InfluenceContract` | `influence.ComposableInfluence` | influence, train, queries, slow_scores, modes, dampings |
| `TileStoreContract` | `store.tiles.TileStore` | open_store |

Every contract has the hook `array`, NumPy numbers to the framework's, and `rounding`, in eps.
"""

from headwater.testing.batches import BatchContract as BatchContract
from headwater.testing.contract import Contract as Contract
from headwater.testing.gradients import GradientContract as GradientContract
from headwater.testing.influences import InfluenceContract as InfluenceContract
from headwater.testing.mappers import BlockMapperContract as BlockMapperContract
from headwater.testing.operators import BilinearFormContract as BilinearFormContract
from headwater.testing.operators import LinearOperatorContract as LinearOperatorContract
from headwater.testing.operators import OperatorContract as OperatorContract
from headwater.testing.operators import RememberedGradients as RememberedGradients
from headwater.testing.providers import GradientProviderContract as GradientProviderContract
from headwater.testing.providers import StructuredProviderContract as StructuredProviderContract
from headwater.testing.stores import TileStoreContract as TileStoreContract
