"""How far a step is predicted to lower the loss, to first order."""

from __future__ import annotations

from typing import Any

from normclip._arguments import Tensors, check_positive
from normclip._formulas import Scalar, evaluate, square, times
from normclip.products import dot
from normclip.theory._wide import wide


def predicted_descent(updates: Tensors, gradients: Tensors, lr: float) -> Any:
    r"""By how much a step is predicted to lower the loss.

    .. math:: L(\theta) - L(\theta - \eta u) \approx \eta\, \langle u, g \rangle

    Args:
        updates: The direction u of the step before the learning rate, as for :func:`normclip.dot`.
        gradients: The gradient g, as for :func:`normclip.dot`.
        lr: The learning rate η.

    Returns:
        The predicted descent, in the unit of the loss; a float, or for tensors on a device a 0-dim float64 tensor there.

    Raises:
        TypeError, ValueError: As for :func:`normclip.dot`.

    References:
        Su: kexue.fm/archives/10657.

    Example:
        >>> import numpy as np
        >>> gradient = np.array([3.0, -4.0])
        >>> predicted_descent(np.sign(gradient), gradient, lr=0.5)
        3.5
    """
    return evaluate(lambda xp, inner: times(xp, inner, lr), dot(updates, gradients))


def sgd_descent(norm: Scalar, lr: float) -> Scalar:
    r"""The predicted descent of gradient descent, whose update is the gradient: :math:`\eta\, n^2`.

    Args:
        norm: The norm n of the gradient: a float, or a scalar of NumPy or torch.
        lr: The learning rate η.

    Returns:
        The predicted descent, of the type of ``norm``.

    Example:
        >>> sgd_descent(5.0, lr=0.1)
        2.5
    """
    return evaluate(lambda xp, n: square(xp, n, lr), norm)


def sign_descent(l1: Scalar, lr: float) -> Scalar:
    r"""The predicted descent of sign descent, whose update is the sign of the gradient. It is a simple model of Adam.

    .. math:: \eta\, \|g\|_1 = \eta\, \sqrt{N}\, \|g\|_2 \cos(\operatorname{sign} g, g)

    where N is the number of elements that are not zero. So if norm and cosine do not depend on the size of a model, the learning rate
    should scale by :func:`rate_scaling`.

    Args:
        l1: :math:`\|g\|_1`, as in ``normclip.grad_stats(model).l1``.
        lr: The learning rate η.

    Returns:
        The predicted descent, of the type of ``l1``.

    References:
        Su: kexue.fm/archives/10657.

    Example:
        >>> sign_descent(7.0, lr=0.5)
        3.5
    """
    return evaluate(lambda xp, n: times(xp, n, lr), l1)


def rate_scaling(elements: float, reference_elements: float) -> float:
    r"""What to multiply the learning rate of Adam by for a model of another size: with four times the parameters, by one half.

    .. math:: \Big(\frac{N}{N_0}\Big)^{-1/2}

    This keeps the predicted descent of :func:`sign_descent` if norm and sign-cosine of the gradient are the same for both models.

    Args:
        elements: The number of elements N > 0 of the new model.
        reference_elements: The number of elements N₀ > 0 of the model whose learning rate is known.

    Returns:
        The factor.

    Raises:
        ValueError: A number is not positive and finite.

    Example:
        >>> rate_scaling(4_000_000, 1_000_000)
        0.5
    """
    reference, number = check_positive("reference_elements", reference_elements), check_positive("elements", elements)
    with wide(reference, number) as (known, wanted):
        return float((known / wanted).sqrt())
