package node

import (
	"context"
	"expvar"
	"time"

	"tailscale.com/metrics"

	"derpd/cmd/derpd/internal/config"
)

const (
	noticesEvery = time.Minute     // between two checks of the certificate
	noticesTake  = 5 * time.Second // at most, for all clients

	// stopNotice is the part of stopTimeout for the last text.
	stopNotice = 100 * time.Millisecond

	// certificateEnds is the time before a certificate's end at which clients get a
	// warning. Certificates that live for a few days have less.
	certificateEnds = 2 * day
)

// runNotices sends connected clients a warning while the relay is about to be
// unusable, and takes it back afterwards, until ctx ends.
func (n *Node) runNotices(ctx context.Context) error {
	return repeat(ctx, noticesEvery, func() { n.sendNotice(ctx) })
}

func (n *Node) sendNotice(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, noticesTake)
	defer cancel()
	n.relay.Tell(ctx, "certificate", n.certificateNotice())
}

// certificateNotice is the text for a certificate that ends soon and was not
// renewed, or empty.
func (n *Node) certificateNotice() string {
	if n.certs == nil {
		return ""
	}
	s := n.certs.Status()
	if s.Leaf == nil {
		return ""
	}
	warned := certificateEnds
	if s.Err == nil {
		// The next certificate of an authority, or of a program that replaces
		// the files, may still come.
		if n.config.Certificate.Mode == config.ModeLetsEncrypt {
			return ""
		}
		warned = min(warned, s.Leaf.NotAfter.Sub(s.Leaf.NotBefore)/4)
	}
	if time.Until(s.Leaf.NotAfter) >= warned {
		return ""
	}
	return "the certificate of this relay was not renewed and ends at " + s.Leaf.NotAfter.UTC().Format("2006-01-02 15:04 MST") + "; no node can connect after that"
}

// noticeStop sends the last text. Clients drop it when they connect again. The
// text of a client that does not read is given up at the end of stopNotice, since
// [relay.Relay.Close] ends the write.
func (n *Node) noticeStop() {
	ctx, cancel := context.WithTimeout(context.Background(), stopNotice)
	go func() {
		defer cancel()
		n.relay.Tell(ctx, "stopping", "this relay is stopping")
	}()
	<-ctx.Done()
}

func (n *Node) toldMetrics() []expvar.KeyValue {
	told := n.relay.Told()
	texts := &metrics.MultiLabelMap[reasonLabel]{Type: "counter", Help: "Texts sent to clients, which show them as a health problem."}
	for _, reason := range []string{"refused", "unavailable", "busy", "app", "slowed", "certificate", "stopping"} {
		texts.Set(reasonLabel{reason}, number(told.Texts[reason]))
	}
	return []expvar.KeyValue{
		{Key: "derpd_told_total", Value: texts},
		{Key: "gauge_derpd_held_connections", Value: number(told.Held)},
	}
}
