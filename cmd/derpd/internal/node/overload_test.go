package node

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"derpd/relay"
)

// TestOverloadOrFault asserts that an overload explains only timeouts and the kernel's
// refusals, only while clients are served, and only for a while.
func TestOverloadOrFault(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var clients, packets int64
		var refused uint64
		var handshakes relay.Handshakes
		limited := []relay.LimitCount{{Limit: relay.LimitStrangers}}
		o := &overload{
			served:     func() (int64, int64) { return clients, packets },
			handshakes: func() relay.Handshakes { return handshakes },
			limited:    func() []relay.LimitCount { return limited },
			refused:    func() uint64 { return refused },
		}
		late := fmt.Errorf("connecting: %w", context.DeadlineExceeded)
		noFile := &net.OpError{Op: "dial", Err: os.NewSyscallError("socket", syscall.EMFILE)}
		expect := func(what string, err error, want bool) {
			t.Helper()
			if got := o.judge(err); (got != nil) != want {
				t.Errorf("%s: %v", what, got)
			}
		}
		pass := func() { packets += 10 }

		pass()
		expect("late on an idle machine", late, false)
		expect("no file, no client", noFile, false)
		clients = 1
		expect("no file, a client", noFile, true)

		handshakes = relay.Handshakes{Refused: 1, LastRefused: time.Now()}
		pass()
		expect("late and crowded", late, true)
		expect("late and crowded, no packet passes", late, false)
		for _, fault := range []error{errors.New("tls: internal error"), errNoCertificate, syscall.ECONNREFUSED} {
			pass()
			expect(fault.Error(), fault, false)
		}
		<-time.After(overloadRecent)
		pass()
		expect("late, crowded a while ago", late, false)

		refused++
		pass()
		expect("late, files short", late, true)
		<-time.After(overloadRecent)
		pass()
		expect("late, files short a while ago", late, false)

		limited[0].Count, limited[0].Last = 1, time.Now()
		pass()
		expect("late, at a limit of connections", late, true)
		expect("late, at a limit of connections, no packet passes", late, false)
		<-time.After(overloadRecent)
		pass()
		expect("late, at a limit a while ago", late, false)
	})
}
