package admit_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tailscale.com/types/key"

	"derpd/internal/testkit"
	"derpd/internal/testkit/peers"
	"derpd/relay/admit"
)

// ask asks a source about a node.
func ask(ctx context.Context, s admit.Source, node key.NodePublic) error {
	_, err := s.Ask(ctx, node, netip.MustParseAddr("192.0.2.1"))
	return err
}

// wantYes, wantNo and wantUnknown wait for an answer: real peers take a moment
// to learn of a change. A no on the way to a yes would have cut the node off.
func wantYes(t *testing.T, what string, s admit.Source, node key.NodePublic) {
	t.Helper()
	testkit.Wait(t, what+" to be admitted", func(ctx context.Context) error {
		err := ask(ctx, s, node)
		if errors.Is(err, admit.ErrRefused) {
			t.Fatalf("%s is refused: %v", what, err)
		}
		return err
	})
}

func wantNo(t *testing.T, what string, s admit.Source, node key.NodePublic) {
	t.Helper()
	testkit.Wait(t, what+" to be refused", func(ctx context.Context) error {
		if err := ask(ctx, s, node); !errors.Is(err, admit.ErrRefused) {
			return errors.New("the answer is " + fmt.Sprint(err))
		}
		return nil
	})
}

// wantUnknown wants an error that is not a no, and has one of the reasons.
func wantUnknown(t *testing.T, s admit.Source, node key.NodePublic, reasons ...string) {
	t.Helper()
	testkit.Wait(t, fmt.Sprintf("an answer with %q", reasons), func(ctx context.Context) error {
		err := ask(ctx, s, node)
		if errors.Is(err, admit.ErrRefused) {
			t.Fatalf("refused: %v; want %q", err, reasons)
		}
		for _, reason := range reasons {
			if err != nil && strings.Contains(err.Error(), reason) {
				return nil
			}
		}
		return errors.New("the answer is " + fmt.Sprint(err))
	})
}

// network is a headscale, and nodes that are logged in.
func network(t *testing.T, names ...string) (*peers.Headscale, []*peers.Tailscaled) {
	t.Helper()
	h := peers.NewHeadscale(t)
	h.SetMap(t, peers.StartRelay(t))
	h.Start(t)
	nodes := make([]*peers.Tailscaled, len(names))
	for i, name := range names {
		nodes[i] = peers.StartTailscaled(t, h, name)
		nodes[i].Up(t, h.AuthKey(t, "somebody"))
	}
	return h, nodes
}

func TestRealHeadscale(t *testing.T) {
	t.Parallel()
	h, nodes := network(t, "member")
	member, stranger := nodes[0].NodeKey(t), key.NewNode().Public()
	source := admit.URL(admit.URLConfig{Target: h.VerifyURL()})
	wantYes(t, "a member", source, member)
	wantNo(t, "a stranger", source, stranger)

	h.Stop()
	wantUnknown(t, source, member, "connection refused")
	h.Start(t)
	wantYes(t, "a member after a restart of headscale", source, member)

	h.Delete(t, member)
	wantNo(t, "a node that was deleted", source, member)
}

func TestRealTailscaled(t *testing.T) {
	t.Parallel()
	h, nodes := network(t, "beside-the-relay", "member")
	local, member, stranger := nodes[0], nodes[1].NodeKey(t), key.NewNode().Public()
	socket := filepath.Join(t.TempDir(), "socket")
	source := admit.Tailscaled(socket, time.Hour)
	wantUnknown(t, source, member, "no such file")
	if err := os.Symlink(local.Socket, socket); err != nil {
		t.Fatal(err)
	}
	wantYes(t, "a member once the socket is there", source, member)
	wantYes(t, "the node of tailscaled itself", source, local.NodeKey(t))
	wantNo(t, "a stranger", source, stranger)

	local.Stop()
	wantUnknown(t, source, member, "no such file")
	local.Start(t)
	wantYes(t, "a member after a restart of tailscaled", source, member)

	h.Delete(t, member)
	wantNo(t, "a node that was deleted", source, member)
}

// While tailscaled does not know its network it finds nobody; that must not cut
// off the nodes that are connected.
func TestRealTailscaledWithoutNetwork(t *testing.T) {
	t.Parallel()
	h, nodes := network(t, "member")
	member, stranger := nodes[0].NodeKey(t), key.NewNode().Public()
	local := peers.StartTailscaled(t, h, "beside-the-relay")
	source := admit.Tailscaled(local.Socket, time.Hour)
	wantUnknown(t, source, member, "not logged in (NeedsLogin): run tailscale up")

	local.Up(t, h.AuthKey(t, "somebody"))
	wantYes(t, "a member", source, member)
	strict := admit.Tailscaled(local.Socket, 0)
	wantYes(t, "a member, without a grace", strict, member)

	// It keeps a map of its own, in which the member is missing.
	local.Run(t, "down")
	local.Stop()
	local.Start(t)
	wantUnknown(t, source, member, "disconnected (Stopped): run tailscale up")
	local.Run(t, "up")
	wantYes(t, "a member when tailscaled is up again", source, member)

	h.Stop()
	testkit.Wait(t, "tailscaled to lose headscale", func(context.Context) error {
		if local.Status(t).Self.Online {
			return errors.New("it is online")
		}
		return nil
	})
	wantYes(t, "a member that tailscaled still knows", source, member)
	wantUnknown(t, admit.Tailscaled(local.Socket, time.Hour), member, "no connection to its control server")
	wantUnknown(t, strict, member, "no connection to its control server")
	wantUnknown(t, source, stranger, "no connection to its control server")
	local.Stop()
	local.Start(t)
	wantUnknown(t, source, member, "no connection to its control server", "not connected yet")
	h.Start(t)
	wantYes(t, "a member when headscale is back", source, member)
	wantNo(t, "a stranger", source, stranger)

	h.Expire(t, local.NodeKey(t))
	testkit.Wait(t, "tailscaled to learn that it expired", func(context.Context) error {
		if state := local.Status(t).BackendState; state != "NeedsLogin" {
			return errors.New(state)
		}
		return nil
	})
	wantUnknown(t, source, stranger, "not logged in")
	local.Logout(t)
	wantUnknown(t, source, member, "not logged in")
}
