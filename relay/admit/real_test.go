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

// wantAdmitted, wantRefused and wantUnavailable wait for an answer: real peers
// take a moment to apply a change. A refusal before the node is admitted is a
// failure, since the node would have been disconnected.
func wantAdmitted(t *testing.T, what string, s admit.Source, node key.NodePublic) {
	t.Helper()
	testkit.Wait(t, what+" to be admitted", func(ctx context.Context) error {
		err := ask(ctx, s, node)
		if errors.Is(err, admit.ErrRefused) {
			t.Fatalf("%s is refused: %v", what, err)
		}
		return err
	})
}

func wantRefused(t *testing.T, what string, s admit.Source, node key.NodePublic) {
	t.Helper()
	testkit.Wait(t, what+" to be refused", func(ctx context.Context) error {
		if err := ask(ctx, s, node); !errors.Is(err, admit.ErrRefused) {
			return errors.New("the answer is " + fmt.Sprint(err))
		}
		return nil
	})
}

// wantUnavailable waits for an error with one of the reasons. A refusal is a
// failure.
func wantUnavailable(t *testing.T, s admit.Source, node key.NodePublic, reasons ...string) {
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

// network starts a headscale, and nodes that are logged in.
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
	member, other := nodes[0].NodeKey(t), key.NewNode().Public()
	source := admit.URL(admit.URLConfig{Target: h.VerifyURL()})
	wantAdmitted(t, "a member", source, member)
	wantRefused(t, "another node", source, other)

	h.Stop()
	wantUnavailable(t, source, member, "connection refused")
	h.Start(t)
	wantAdmitted(t, "a member after a restart of headscale", source, member)

	h.Delete(t, member)
	wantRefused(t, "a node that was deleted", source, member)
}

func TestRealTailscaled(t *testing.T) {
	t.Parallel()
	h, nodes := network(t, "beside-the-relay", "member")
	local, member, other := nodes[0], nodes[1].NodeKey(t), key.NewNode().Public()
	socket := filepath.Join(t.TempDir(), "socket")
	source := admit.Tailscaled(socket, time.Hour)
	wantUnavailable(t, source, member, "no such file")
	if err := os.Symlink(local.Socket, socket); err != nil {
		t.Fatal(err)
	}
	wantAdmitted(t, "a member once the socket is there", source, member)
	wantAdmitted(t, "the node of tailscaled itself", source, local.NodeKey(t))
	wantRefused(t, "another node", source, other)

	local.Stop()
	wantUnavailable(t, source, member, "no such file")
	local.Start(t)
	wantAdmitted(t, "a member after a restart of tailscaled", source, member)

	h.Delete(t, member)
	wantRefused(t, "a node that was deleted", source, member)
}

// Without its network map, tailscaled finds no node. Connected nodes must not be
// disconnected for that.
func TestRealTailscaledWithoutNetwork(t *testing.T) {
	t.Parallel()
	h, nodes := network(t, "member")
	member, other := nodes[0].NodeKey(t), key.NewNode().Public()
	local := peers.StartTailscaled(t, h, "beside-the-relay")
	source := admit.Tailscaled(local.Socket, time.Hour)
	wantUnavailable(t, source, member, "not logged in (NeedsLogin): run tailscale up")

	local.Up(t, h.AuthKey(t, "somebody"))
	wantAdmitted(t, "a member", source, member)
	strict := admit.Tailscaled(local.Socket, 0)
	wantAdmitted(t, "a member, without a grace", strict, member)

	// The stored map lacks the member.
	local.Run(t, "down")
	local.Stop()
	local.Start(t)
	wantUnavailable(t, source, member, "disconnected (Stopped): run tailscale up")
	local.Run(t, "up")
	wantAdmitted(t, "a member when tailscaled is up again", source, member)

	h.Stop()
	testkit.Wait(t, "tailscaled to lose headscale", func(context.Context) error {
		if local.Status(t).Self.Online {
			return errors.New("it is online")
		}
		return nil
	})
	wantAdmitted(t, "a member that tailscaled still knows", source, member)
	wantUnavailable(t, admit.Tailscaled(local.Socket, time.Hour), member, "no connection to its control server")
	wantUnavailable(t, strict, member, "no connection to its control server")
	wantUnavailable(t, source, other, "no connection to its control server")
	local.Stop()
	local.Start(t)
	wantUnavailable(t, source, member, "no connection to its control server", "not connected yet")
	h.Start(t)
	wantAdmitted(t, "a member when headscale is back", source, member)
	wantRefused(t, "another node", source, other)

	h.Expire(t, local.NodeKey(t))
	testkit.Wait(t, "tailscaled to learn that it expired", func(context.Context) error {
		if state := local.Status(t).BackendState; state != "NeedsLogin" {
			return errors.New(state)
		}
		return nil
	})
	wantUnavailable(t, source, other, "not logged in")
	local.Logout(t)
	wantUnavailable(t, source, member, "not logged in")
}
