//go:build !linux

package relay

import (
	"context"
	"errors"
)

// serveBatches is for Linux alone.
func (s *STUN) serveBatches(context.Context) error { return errors.ErrUnsupported }

// receiveBuffer is 0: nothing is known about other systems.
func (s *STUN) receiveBuffer() int { return 0 }
