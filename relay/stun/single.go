package stun

import "context"

// serveSingly answers requests one by one, on systems without recvmmsg and sendmmsg.
func (s *Server) serveSingly(context.Context) error {
	var packet [packetSize]byte
	var control [controlSize]byte
	for {
		n, controlLen, _, from, err := s.conn.ReadMsgUDPAddrPort(packet[:], control[:])
		if err != nil {
			return err
		}
		s.failures.Succeeded()
		if reply, source := s.reply(packet[:n], control[:controlLen], from); reply != nil {
			_, _, err := s.conn.WriteMsgUDPAddrPort(reply, source, from)
			s.sent(1, err)
		}
	}
}
